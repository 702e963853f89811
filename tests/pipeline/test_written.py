"""Text that the model writes itself."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.pipeline.written import BATCH, self_written
from bitwright.runtime.load import load_model
from bitwright.runtime.source import resolve


@pytest.fixture(scope="module")
def model(llama: Path) -> Any:
    return load_model(resolve(llama))


def never() -> Any:
    raise AssertionError("the model was loaded without need")


def test_rows_are_the_models_own(model: Any) -> None:
    tokens = self_written(lambda: model, BATCH + 5, 12, 0)
    assert tokens.shape == (BATCH + 5, 12)
    assert len(set(tokens[:, 0].tolist())) == BATCH + 5  # no first token twice
    assert torch.equal(tokens[:4], self_written(lambda: model, 4, 12, 0))
    assert not torch.equal(tokens[:4], self_written(lambda: model, 4, 12, 1))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    for position in (1, 2, 3):  # top-1 at first
        assert torch.equal(logits[:, position - 1].argmax(-1), tokens[:, position])
    later = torch.stack([logits[:, p - 1].argmax(-1) == tokens[:, p] for p in range(6, 12)])
    assert float(later.float().mean()) < 0.9


def test_what_is_written_is_not_written_again(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rows.jsonl"
    first = self_written(lambda: model, 3, 8, 0, file=file)
    assert torch.equal(first, self_written(never, 3, 8, 0, file=file))
    data = file.read_bytes()
    more = self_written(lambda: model, BATCH + 3, 8, 0, file=file)
    assert torch.equal(more[:3], first)
    assert file.read_bytes().startswith(data)
    file.write_bytes(data + b"[[1, 2")  # a crash in the middle of a line
    assert torch.equal(self_written(lambda: model, BATCH + 3, 8, 0, file=file), more)
    assert torch.equal(self_written(never, BATCH + 3, 8, 0, file=file), more)
