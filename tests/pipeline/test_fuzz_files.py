"""Damaged GGUF files, index files and config.json: one clear line, no hang, no memory."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from support.fuzz import SECONDS, answers_in_one_line, fuzz
from support.models import make_model

import bitwright
from bitwright.errors import BadCheckpoint
from bitwright.pipeline.checkpoint import INDEX, open_checkpoint
from bitwright.pipeline.gguf_header import read_header
from bitwright.pipeline.gguf_import import gguf_folder
from bitwright.pipeline.topology import discover

HUGE = st.sampled_from([0, 1, 2, 31, 255, 1 << 16, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 64) - 1])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("gguf")
    model = make_model(folder / "model")
    bitwright.quantize(model, folder / "out", format="gguf", scheme="W4A16")
    return (folder / "out" / "model.gguf").read_bytes()


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Bytes, 64-bit lengths and 32-bit types overwritten, mostly where the facts stand; or cut."""
    changed = bytearray(content)
    end = content.index(b"blk.1.attn_k.weight") + 400
    first = content.index(b"tokenizer.ggml.tokens")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, first), st.integers(end - 2500, end)))
        kind = data.draw(st.sampled_from(["B", "Q", "I"]))
        value = data.draw(HUGE)
        size = struct.calcsize("<" + kind)
        changed[place : place + size] = struct.pack("<Q", value)[:size]
    if data.draw(st.booleans()):
        del changed[data.draw(st.integers(0, len(changed))) :]
    return bytes(changed)


def test_gguf_headers(gguf: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"

    def check(data: st.DataObject) -> None:
        file.write_bytes(damaged(gguf, data))
        answers_in_one_line(lambda: read_header(file))

    fuzz(check, examples=200)


def test_gguf_files_as_models(gguf: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes the check goes through transformers."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"

    def check(data: st.DataObject) -> None:
        file.write_bytes(damaged(gguf, data))
        answers_in_one_line(lambda: discover(open_checkpoint(gguf_folder(file))))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    fuzz(check, examples=60 if SECONDS else 10)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (b"tokenizer.ggml.tokens", 1 << 60, "an array of 1152921504606846976 values"),
        (b"general.name", 1 << 50, "should go on for"),
    ],
)
def test_lengths_that_would_hang_a_reader(
    place: bytes, value: int, says: str, gguf: bytes, tmp_path: Path
) -> None:
    at = gguf.index(place) + len(place) + (8 if b"tokens" in place else 4)
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf[:at] + struct.pack("<Q", value) + gguf[at + 8 :])
    with pytest.raises(BadCheckpoint, match=says):
        read_header(file)


@pytest.mark.parametrize("key", ["block_count", "feed_forward_length", "embedding_length"])
def test_sizes_that_are_not_the_tensors(key: str, gguf: bytes, tmp_path: Path) -> None:
    name = f"llama.{key}".encode()
    at = gguf.index(name) + len(name) + 4
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf[:at] + struct.pack("<I", 1 << 30) + gguf[at + 4 :])
    with pytest.raises(BadCheckpoint, match=f"llama.{key} says 1073741824, but its tensors have"):
        read_header(file)


def test_overlapping_tensors(gguf: bytes, tmp_path: Path) -> None:
    at = gguf.index(b"blk.1.attn_v.weight") + len(b"blk.1.attn_v.weight") + 4 + 16 + 4
    file = tmp_path / "model.gguf"
    file.write_bytes(gguf[:at] + struct.pack("<Q", 0) + gguf[at + 8 :])
    with pytest.raises(BadCheckpoint, match="overlap"):
        read_header(file)


@pytest.fixture(scope="module")
def sharded(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "out"
    bitwright.quantize(model_of("llama"), out, group_size=32)
    return out


def test_index_files(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    index = json.loads((folder / INDEX).read_text())
    files = st.sampled_from(
        [
            INDEX, "config.json", ".", "..", "../model/model-00001-of-00004.safetensors", "",
            "/etc/passwd", "model-00009-of-00004.safetensors", "nul\0", "a" * 300, "loop",
            *sorted(set(index["weight_map"].values())),
        ]
    )  # fmt: skip
    (folder / "loop").symlink_to("loop")
    other = st.one_of(st.none(), st.integers(), st.lists(st.text(max_size=3), max_size=2), files)

    def check(data: st.DataObject) -> None:
        changed = json.loads(json.dumps(index))
        for _ in range(data.draw(st.integers(1, 3))):
            what = data.draw(st.sampled_from(["value", "drop", "add", "map"]))
            name = data.draw(st.sampled_from(sorted(index["weight_map"])))
            if what == "map" or not isinstance(changed.get("weight_map"), dict):
                changed["weight_map"] = data.draw(other)
            elif what == "drop":
                changed["weight_map"].pop(name, None)
            else:
                key = name if what == "value" else data.draw(st.text(max_size=5))
                changed["weight_map"][key] = data.draw(other)
        (folder / INDEX).write_text(json.dumps(changed))
        answers_in_one_line(lambda: open_checkpoint(folder))

    fuzz(check)


def test_a_nest_of_objects_is_refused(sharded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / INDEX).write_text('{"weight_map":' * 100_000)
    with pytest.raises(BadCheckpoint, match="cannot be read as JSON"):
        open_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_values_of_the_config(model_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_of("llama"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    values: Any = st.one_of(
        HUGE, st.integers(-(1 << 40), 1 << 40), st.none(), st.floats(), st.text(max_size=4),
        st.lists(st.integers(), max_size=2), st.just({}),
    )  # fmt: skip

    def check(data: st.DataObject) -> None:
        changed = dict(config)
        for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
            changed[key] = data.draw(values)
        (folder / "config.json").write_text(json.dumps(changed))
        answers_in_one_line(lambda: discover(open_checkpoint(folder)))

    fuzz(check)
