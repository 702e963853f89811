"""Texts and the windows cut from them."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.api import load_tokenizer
from bitwright.errors import BadRequest
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.texts import (
    calibration_windows,
    evaluation_windows,
    first_tokens,
    read_text,
    tokenize,
)


def test_text_files_and_lines_of_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain\ntext", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n"two"\n', encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) == "plain\ntext"
    assert read_text(str(tmp_path / "b.jsonl")) == "one\n\ntwo"


def test_a_dataset_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` takes owner/name from the working directory before it asks the hub."""
    pytest.importorskip("datasets")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = [json.dumps({"text": f"row {i}", "other": i}) for i in range(5)]
    file = tmp_path / "owner" / "name" / "train.jsonl"
    file.write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_text("owner/name") == "\n\n".join(f"row {i}" for i in range(5))
    file.write_text(json.dumps({"words": "none"}), encoding="utf-8")
    with pytest.raises(BadRequest, match="hub dataset 'owner/name' cannot be read"):
        read_text("owner/name")


def test_the_embedded_text_is_long_english() -> None:
    text = read_text("pydoc")
    assert len(text) > 300_000
    assert text.count(" the ") > 1000


@pytest.mark.parametrize("source", ["absent.txt", "./absent", "/absent/file", "word"])
def test_sources_that_are_neither_file_nor_dataset(source: str) -> None:
    with pytest.raises(BadRequest, match="not a file"):
        read_text(source)


@given(
    tokens=st.integers(10, 400),
    samples=st.integers(1, 12),
    length=st.integers(2, 10),
    seed=st.integers(0, 99),
)
def test_windows_are_parts_of_the_text_and_do_not_overlap(
    tokens: int, samples: int, length: int, seed: int
) -> None:
    ids = torch.arange(tokens)
    windows, note = calibration_windows(ids, samples, length, seed)
    available = tokens // length
    assert windows.shape == (min(samples, available), length)
    assert bool(note) == (available < samples)
    assert torch.equal(windows[:, 1:], windows[:, :-1] + 1)
    flat = windows.flatten()
    assert len(flat.unique()) == len(flat)
    assert torch.equal(windows, calibration_windows(ids, samples, length, seed)[0])
    first = evaluation_windows(ids, samples, length)
    assert torch.equal(first.flatten(), ids[: min(samples, available) * length])


def test_seeds_draw_different_windows() -> None:
    ids = torch.arange(5000)
    drawn = {tuple(calibration_windows(ids, 8, 10, seed)[0][:, 0].tolist()) for seed in range(5)}
    assert len(drawn) == 5


def test_a_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(BadRequest, match="9 tokens, fewer than one sample of 10"):
        calibration_windows(torch.arange(9), 1, 10, 0)
    with pytest.raises(BadRequest, match="9 tokens, fewer than one window of 10"):
        evaluation_windows(torch.arange(9), 1, 10)


def test_no_special_tokens_are_added(llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenize(tokenizer, "the sea " * 500)
    assert ids.dtype is torch.int64
    assert tokenizer.decode(ids) == "the sea " * 500


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("needed", [1, 100, 3000])
def test_the_first_tokens_are_those_of_the_whole(
    needed: int, suffix: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(open_checkpoint(llama))
    lines = text.read_text(encoding="utf-8").split("\n")
    file = tmp_path / f"long{suffix}"
    rows = lines if suffix == ".txt" else [json.dumps({"text": line}) for line in lines]
    file.write_text("\n".join(rows * 30), encoding="utf-8")
    whole = tokenize(tokenizer, read_text(str(file)))
    assert whole.numel() > 5 * (needed + 256)
    assert torch.equal(first_tokens(tokenizer, str(file), needed), whole[:needed])
    assert torch.equal(first_tokens(tokenizer, str(file), 10**6), whole)


def test_a_text_longer_than_memory_is_not_read(llama: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(llama))
    file = tmp_path / "endless.txt"
    file.write_text(text.read_text(encoding="utf-8") * 3, encoding="utf-8")
    with file.open("r+b") as handle:
        handle.truncate(1 << 42)  # a hole of four terabytes
    whole = tokenize(tokenizer, text.read_text(encoding="utf-8"))
    assert torch.equal(first_tokens(tokenizer, str(file), 500), whole[:500])
