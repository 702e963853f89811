"""What `bitwright compare` saves from its second scheme on: CPU seconds, in one process.

A row alone reads the calibration text, loads the original and runs it on the windows; later rows of
a comparison find all three done. Processor time, so that a busy machine counts less.

    python benchmarks/sharing.py --model REFERENCE --text test.txt --calibration valid.txt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Results, Row, Table

from bitwright.api import calibration_tokens, load_tokenizer, resolve
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.evaluation.remember import Remembered
from bitwright.pipeline.texts import evaluation_windows, first_tokens
from bitwright.runtime.load import load_model
from bitwright.schemes.plan import Calibration


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, result)."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main() -> None:
    """Each shared part, and a row's scoring with and without it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--calibration-length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--name", default="sharing", help="of the results file, replaced")
    args = parser.parse_args()
    source = resolve(args.model)
    wanted = Calibration(args.calibration, args.samples, args.calibration_length)
    reading, _ = timed(lambda: calibration_tokens(source, wanted, 0))
    loading, original = timed(lambda: load_model(source))
    count = args.windows * args.sequence_length
    ids = first_tokens(load_tokenizer(source), args.text, count)
    windows_NT = evaluation_windows(ids, args.windows, args.sequence_length)
    remembered = Remembered(original)

    def score(reference: Any) -> None:
        with torch.no_grad():
            evaluate_model(original, windows_NT, reference=reference)

    alone, _ = timed(lambda: score(original))
    score(remembered)
    later, _ = timed(lambda: score(remembered))
    row: Row = {
        "reading_calibration": round(reading, 2), "loading_original": round(loading, 2),
        "scoring_alone": round(alone, 2), "scoring_later": round(later, 2),
        "saved_per_row": round(reading + loading + alone - later, 2),
    }  # fmt: skip
    results = Results(args.name, fresh=True)
    results.add({"windows": args.windows, "sequence_length": args.sequence_length}, row)
    table = Table(("CPU seconds", 22, ""), ("", 8, ".2f"))
    for name, value in row.items():
        table.row(name, value)


if __name__ == "__main__":
    main()
