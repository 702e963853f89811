"""Text that a model writes itself, for calibrating and training without data.

Liu et al. 2023 (LLM-QAT, arXiv:2305.17888), section 3.1, "hybrid sampling": a random first
token, the next three to five tokens by top-1, the rest sampled from the full distribution.
No two rows start with the same token until the vocabulary is used up, so none repeats another.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.pipeline.writer import disk

BATCH = 32  # rows written together; what row i says does not depend on how many are asked for


def self_written(
    load: Callable[[], Any],
    samples: int,
    length: int,
    seed: int,
    *,
    file: Path | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Tensor:
    """Token rows (samples, length), int64, written by the model that ``load`` returns.

    With ``file``, batches go there as they are finished, and those already there are not written
    again: a run that was stopped goes on, a later one that wants more rows starts from these.
    ``load`` is only called if something is missing.
    """
    batches = [] if file is None else _known(file, length)
    wanted = -(-samples // BATCH)
    model = load() if len(batches) < wanted else None
    while len(batches) < wanted:
        rows = _batch(
            model, len(batches), length, seed,
            lambda done: progress(done, wanted * length, "the model writes its own text"),
        )  # fmt: skip
        batches.append(rows)
        if file is not None:
            _append(file, rows)
    return torch.cat(batches)[:samples]


@torch.no_grad()
def _batch(
    model: Any, index: int, length: int, seed: int, progress: Callable[[int], None]
) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    places = (torch.arange(BATCH) + index * BATCH) % vocabulary
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index + 1)
    greedy_N = torch.randint(3, 6, (BATCH,), generator=generator)
    tokens = torch.empty(BATCH, length, dtype=torch.int64)
    tokens[:, 0] = order[places]
    cache = None
    for position in range(1, length):
        last = tokens[:, position - 1 : position].to(model.device)
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[:, -1].float().cpu()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        tokens[:, position] = torch.where(position <= greedy_N, logits.argmax(-1), drawn)
        progress(index * length + position)
    return tokens


def _known(file: Path, length: int) -> list[Tensor]:
    """The batches in ``file``, up to the first line that is not a whole batch."""
    found = []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []
    for line in lines:
        try:
            rows = torch.tensor(json.loads(line), dtype=torch.int64)
        except (ValueError, TypeError):
            break
        if rows.shape != (BATCH, length):
            break
        found.append(rows)
    return found


def _append(file: Path, rows: Tensor) -> None:
    with disk(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        data = file.read_bytes() if file.is_file() else b""
        with file.open("r+b" if data else "wb") as handle:
            handle.truncate(data.rfind(b"\n") + 1)  # a line torn by a crash
            handle.seek(0, os.SEEK_END)
            handle.write(json.dumps(rows.tolist()).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
