"""Damaged checkpoints, at random: they are read, or refused in one clear line, and nothing else.

See support/fuzz.py for more of it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support.fuzz import answers_in_one_line, fuzz

import bitwright
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import format_of, read_layer

REQUESTS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"scheme": "W4A16", "group_size": 32, "asymmetric": True},
    "gptq": {"scheme": "W4A16", "group_size": 32},
    "awq": {"scheme": "W4A16", "group_size": 32, "asymmetric": True},
    "fp8": {"scheme": "W8A8-FP8", "granularity": "tensor"},
    "modelopt": {"scheme": "NVFP4A16"},
}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 1 << 40), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.lists(st.integers(-1, 300), max_size=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def made(
    model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fuzz")
    for name, request in REQUESTS.items():
        bitwright.quantize(model_of("llama"), root / name, format=name, **request)
    return {name: root / name for name in REQUESTS}


def read_all(folder: Path) -> None:
    """What inspect and evaluate do first."""
    checkpoint = open_checkpoint(folder)
    fmt = format_of(checkpoint)
    if fmt is not None:
        for name in sorted(fmt.quantized_names(set(checkpoint.tensors))):
            read_layer(checkpoint, fmt, name)
    else:
        checkpoint.read(checkpoint.tensors)


def shard(folder: Path) -> Path:
    """The file of the first block."""
    files = sorted(folder.glob("*.safetensors"))
    return next(path for path in files if b"layers.0.mlp.up_proj" in path.read_bytes())


def damaged(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(good, folder))


@pytest.mark.parametrize("fmt", REQUESTS)
def test_bytes_of_the_file(fmt: str, made: dict[str, Path], tmp_path: Path) -> None:
    def check(data: st.DataObject) -> None:
        folder = damaged(made[fmt], tmp_path)
        path = shard(folder)
        content = bytearray(path.read_bytes())
        header = int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, header + 64))
            content[place] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        path.write_bytes(content)
        answers_in_one_line(lambda: read_all(folder))

    fuzz(check)


@pytest.mark.parametrize("fmt", REQUESTS)
def test_shapes_offsets_and_types_of_the_header(
    fmt: str, made: dict[str, Path], tmp_path: Path
) -> None:
    def check(data: st.DataObject) -> None:
        folder = damaged(made[fmt], tmp_path)
        path = shard(folder)
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        name = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
        field = data.draw(st.sampled_from(["shape", "data_offsets", "dtype", "all"]))
        if field == "dtype":
            header[name]["dtype"] = data.draw(
                st.sampled_from(["F32", "I64", "F8_E4M3", "U8", "??"])
            )
        elif field == "all":
            header[name] = data.draw(VALUES)
        else:
            header[name][field] = data.draw(st.lists(st.integers(-1, 1 << 62), max_size=3))
        changed = json.dumps(header).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
        answers_in_one_line(lambda: read_all(folder))

    fuzz(check)


@pytest.mark.parametrize("fmt", REQUESTS)
def test_values_of_the_quantization_config(fmt: str, made: dict[str, Path], tmp_path: Path) -> None:
    def check(data: st.DataObject) -> None:
        folder = damaged(made[fmt], tmp_path)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        place = config["quantization_config"]
        for _ in range(data.draw(st.integers(0, 3))):
            inner = [key for key, value in place.items() if isinstance(value, dict) and value]
            if not inner:
                break
            place = place[data.draw(st.sampled_from(inner))]
        key = data.draw(st.sampled_from(sorted(place)))
        if data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(VALUES)
        path.write_text(json.dumps(config))
        answers_in_one_line(lambda: read_all(folder))

    fuzz(check)


def test_tensors_of_other_shapes(made: dict[str, Path], tmp_path: Path) -> None:
    def check(where: st.DataObject) -> None:
        from safetensors.torch import load_file, save_file

        fmt = where.draw(st.sampled_from(sorted(REQUESTS)))
        folder = damaged(made[fmt], tmp_path)
        tensors = load_file(shard(folder))
        layers = [name for name in tensors if "layers.0.mlp.up_proj" in name]
        name = where.draw(st.sampled_from(sorted(layers)))
        shape = where.draw(st.lists(st.integers(0, 70), max_size=3))
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
        save_file(tensors, shard(folder), metadata={"format": "pt"})
        answers_in_one_line(lambda: read_all(folder))

    fuzz(check)
