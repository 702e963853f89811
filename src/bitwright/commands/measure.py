"""A checkpoint against its original, token by token: the numbers and what the page draws."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.api import load_tokenizer, resolve
from bitwright.commands.record import read_json, run_file
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.evaluation.report import collect
from bitwright.evaluation.report.page import Candidate
from bitwright.evaluation.tokens import (
    TokenScores,
    by_position,
    divergence_summary,
    most_changed,
)
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.runtime.load import load_model

MEASUREMENTS = (
    "perplexity", "perplexity_interval", "reference_perplexity", "perplexity_change", "kl_mean",
    "kl_median", "kl_99", "kl_interval", "top1_agreement", "windows", "sequence_length",
)  # fmt: skip
Progress = Callable[[int, int, str], None]


def candidate_of(
    name: str,
    checkpoint: Checkpoint,
    windows_NT: Tensor | None,
    *,
    original: Checkpoint | None = None,
    reference: Any | None = None,
    remembered: Any | None = None,
    run: dict[str, Any] | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Candidate:
    """Everything about one quantized checkpoint; measured on ``windows_NT`` if there are any.

    ``original`` and ``reference``: the checkpoint it was made from, and that one's model;
    ``remembered``: the same model, for scoring, if it keeps what it computed.
    """
    report = read_json(checkpoint.folder / "quantization_report.json")
    rows = report.get("layers", [])
    row: dict[str, Any] = {
        "bits_per_weight": report.get("bits_per_weight"),
        "bytes": checkpoint.nbytes,
        "seconds": (run or {}).get("seconds"),
        "tokens_per_second_predicted": None,
        "tokens_per_second_measured": None,
    } | dict.fromkeys(MEASUREMENTS)
    details: dict[str, Any] = {"weights": collect.weights(checkpoint, original, rows)}
    if windows_NT is not None:
        model = load_model(checkpoint)
        found, scores = measure(model, remembered or reference, windows_NT, name, progress)
        row |= found
        if reference is not None:
            tokenizer = load_tokenizer(checkpoint)
            details["positions"] = by_position(scores)
            details["tokens"] = most_changed(scores, windows_NT, tokenizer.decode)
        details["inputs"] = collect.activations(checkpoint, model, reference, windows_NT[0], rows)
    run = read_json(run_file(checkpoint.folder)) if run is None else run
    row["seconds"] = run.get("seconds")
    return Candidate(name, row, report, run, details)


def measure(
    model: Any, reference: Any | None, windows_NT: Tensor, note: str, progress: Progress
) -> tuple[dict[str, Any], TokenScores]:
    """The row's measurements, and the scores they come from."""
    scores = TokenScores()
    with torch.no_grad():
        result = evaluate_model(
            model,
            windows_NT,
            reference=reference,
            progress=lambda done, total: progress(done, total, f"scoring {note}"),
            observe=scores.observe,
        )
    found = {key: value for key, value in asdict(result).items() if key in MEASUREMENTS}
    if result.reference_perplexity is not None:
        found["perplexity_change"] = result.perplexity / result.reference_perplexity - 1
        found |= divergence_summary(scores)
    return found, scores


def checkpoint_of(model: str | Path) -> Checkpoint:
    """The checkpoint of a folder, hub id or GGUF file."""
    return resolve(model)
