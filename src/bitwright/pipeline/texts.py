"""Text for calibration and evaluation, as token windows."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadRequest


def read_text(source: str) -> str:
    """The text a source names: a .txt or .jsonl file, "pydoc", or a hub dataset id.

    "pydoc" is the reference manual inside Python's own ``pydoc_data.topics``: English prose
    about a programming language, the same on every machine with that Python.
    """
    if source == "pydoc":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source)
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix in (".jsonl", ".ndjson"):
            return "\n\n".join(_row_text(line, path) for line in text.splitlines() if line.strip())
        return text
    if path.suffix or source.startswith((".", "/")) or "/" not in source:
        raise BadRequest(
            f"text {source!r} is not a file; give a .txt or .jsonl path, 'pydoc', 'self' or a "
            "hub dataset id such as 'owner/name'"
        )
    return _hub_text(source)


def _row_text(line: str, path: Path) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRequest(f"{path} has a line that is not JSON: {error}") from error
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise BadRequest(f"{path}: every line must be a string or have a 'text' field")
    return text


def _hub_text(source: str, rows: int = 4000) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadRequest("reading hub datasets needs: pip install 'bitwright[hub]'") from error
    try:
        stream = load_dataset(source, split="train", streaming=True)
        texts = [row["text"] for _, row in zip(range(rows), stream, strict=False)]
    except Exception as error:  # the hub client raises many unrelated types
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BadRequest(f"hub dataset {source!r} cannot be read: {first}") from error
    return "\n\n".join(texts)


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """All token ids of ``text``, no special tokens added, shape (T,)."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def first_tokens(tokenizer: Any, source: str, needed: int, margin: int = 256) -> Tensor:
    """The first ``needed`` token ids of a text, fewer if it ends, shape (T,).

    Of a file only as much is read as that takes, so its length does not matter. ``margin``
    tokens more are made and dropped: the last ones of a cut text may differ from the whole's.
    """
    path = Path(source)
    if not path.is_file():
        return tokenize(tokenizer, read_text(source))[:needed]
    characters = 8 * (needed + margin)
    while True:
        text, ended = _start_of(path, characters)
        tokens_T = tokenize(tokenizer, text)
        if ended or tokens_T.numel() >= needed + margin:
            return tokens_T[:needed]
        characters *= 2


def _start_of(path: Path, characters: int) -> tuple[str, bool]:
    """(at least so many characters of a file's text, whether that is all of it)."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        if path.suffix not in (".jsonl", ".ndjson"):
            text = lines.read(characters)
            return text, len(text) < characters
        rows: list[str] = []
        size = 0
        for line in lines:
            if line.strip():
                rows.append(_row_text(line, path))
                size += len(rows[-1]) + 2
            if size >= characters:
                return "\n\n".join(rows), False
    return "\n\n".join(rows), True


def calibration_windows(
    tokens_T: Tensor, samples: int, length: int, seed: int
) -> tuple[Tensor, str]:
    """(windows (N, length), note): N = ``samples`` non-overlapping windows drawn with ``seed``.

    A text too short for that gives as many as it has, and the note says so. Raises BadRequest
    if it has not even one.
    """
    available = tokens_T.numel() // length
    if available == 0:
        raise BadRequest(
            f"the calibration text has {tokens_T.numel()} tokens, fewer than one sample of "
            f"{length}: use a longer text or a smaller --sequence-length"
        )
    note = ""
    if available < samples:
        note = f"the calibration text has {available} windows of {length} tokens, not {samples}"
    starts = list(range(available))
    random.Random(seed).shuffle(starts)
    chosen = sorted(starts[:samples])
    windows = tokens_T[: available * length].view(available, length)
    return windows[torch.tensor(chosen)].clone(), note


def evaluation_windows(tokens_T: Tensor, windows: int, length: int) -> Tensor:
    """The first ``windows`` non-overlapping windows; fewer if the text ends. Raises BadRequest."""
    available = min(windows, tokens_T.numel() // length)
    if available == 0:
        raise BadRequest(
            f"the evaluation text has {tokens_T.numel()} tokens, fewer than one window of "
            f"{length}: use a longer text or a smaller --sequence-length"
        )
    return tokens_T[: available * length].view(available, length)
