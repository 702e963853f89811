"""Benchmark tasks on a checkpoint, quantized or not."""

from collections.abc import Sequence
from pathlib import Path

from bitwright.evaluation.tasks import evaluate_tasks


def run_tasks(
    model: str | Path, tasks: Sequence[str], *, limit: int | None = None, shots: int | None = None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, through lm-eval; see `evaluate_tasks`. Raises BadRequest."""
    from bitwright import api

    network, tokenizer = api.load(model)
    return evaluate_tasks(network, tokenizer, [t.strip() for t in tasks], limit=limit, shots=shots)
