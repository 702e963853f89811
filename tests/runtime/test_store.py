"""Models and outputs behind URLs."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.cli import run_here

from bitwright.api import quantize, resolve
from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.runtime.store import stage, upload


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_in_a_store_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    upload(llama, "memory://models/llama")
    assert sorted(memory.ls("/models/llama", detail=False)) == sorted(
        f"/models/llama/{path.name}" for path in llama.iterdir()
    )
    quantize("memory://models/llama", "memory://models/out", scheme="W8A16")
    quantize(llama, tmp_path / "alone", scheme="W8A16")
    for path in (tmp_path / "alone").iterdir():
        assert memory.cat_file(f"/models/out/{path.name}") == path.read_bytes()
    assert resolve("memory://models/out").config["quantization_config"]
    with pytest.raises(BadRequest, match="exists: choose another output"):
        quantize(llama, "memory://models/out", scheme="W8A16")
    quantize(llama, "memory://models/out", scheme="W4A16", group_size=32, overwrite=True)
    assert resolve("memory://models/out").nbytes < resolve(tmp_path / "alone").nbytes


def test_only_what_is_wanted_is_copied_and_changes_are_seen(
    llama: Path, tmp_path: Path, cache: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    for path in llama.iterdir():
        (store / path.name).write_bytes(path.read_bytes())
    (store / "model-2.safetensors").write_bytes(b"2")
    folder = stage(f"file://{store}", ["model-2.safetensors"])
    assert (folder / "config.json").is_file()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model-2.safetensors"]
    assert stage(f"file://{store}", ["model.safetensors"]) == folder
    assert len(list(folder.glob("*.safetensors"))) == 2
    (store / "model-2.safetensors").write_bytes(b"other")
    assert stage(f"file://{store}", []) != folder
    assert list(folder.glob(".partial*")) == []


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("memory://nowhere", "does not exist"),
        ("nosuch://bucket/model", "Protocol not known"),
        pytest.param(
            "s3://bucket/model",
            "s3fs",
            marks=pytest.mark.skipif(bool(find_spec("s3fs")), reason=""),
        ),
    ],
)
def test_wrong_urls_are_one_line(
    url: str, match: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran = run_here(monkeypatch, capsys, "quantize", url, tmp_path / "out", "--quiet")
    assert ran.code == 2
    assert match in ran.err
    assert len(ran.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused() -> None:
    fsspec.filesystem("memory").pipe_file("/models/empty/README.md", b"nothing")
    with pytest.raises(BadCheckpoint, match=r"no config\.json"):
        stage("memory://models/empty")


def test_a_store_that_cannot_be_written_keeps_the_result(
    llama: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(BadRequest, match=r"what was to be written is in .*outgoing"):
        quantize(llama, f"file://{tmp_path}/file/out", scheme="W8A16")
    kept = next((cache / "outgoing").iterdir())
    assert (kept / "config.json").is_file()
