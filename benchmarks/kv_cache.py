"""What each form of the key-value cache costs in perplexity, and how many bytes it takes.

Weights stay as they are; only the cache is rounded, so the difference to the 16-bit row is its
doing. Bytes are those of the tensors that hold the codes and scales of `--tokens` tokens, filled
with random states of the model's shape. Static scales come from one pass over the calibration
text. Rows are saved as they finish; a second run continues where the first one stopped.

    python benchmarks/kv_cache.py --model REFERENCE --text test.txt --calibration valid.txt

CACHE is KIND:SCALES[:asym][:SEARCH][:feedback]: KIND fp8, int8 or int4; SCALES tensor or head
(static, SEARCH absmax, percentile or mse) or token, gN (chosen at run time); feedback: keys are
rounded for the queries of 8 windows of the calibration text, not to nearest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from transformers import DynamicCache

from bitwright.api import load, resolve
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.numerics.feedback import Feedback
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR
from bitwright.pipeline.cache_scales import SEARCHES, Seen, observing
from bitwright.pipeline.texts import calibration_windows, evaluation_windows, read_text, tokenize
from bitwright.runtime.key_feedback import key_feedback
from bitwright.runtime.kv_cache import QuantizedKVCache
from bitwright.schemes.scheme import Spec

SIXTEEN = "16-bit"
FEEDBACK = "feedback"
FEEDBACK_WINDOWS = 8
CACHES = (
    "fp8:tensor", "int8:tensor", "fp8:head", "int8:head", "int8:tensor:percentile",
    "int8:tensor:mse", "fp8:token", "int8:token", "int4:token", "int4:token:asym", "int4:g32",
    "int4:g32:asym", "fp8:tensor:feedback", "int8:tensor:feedback", "int8:token:feedback",
    "int4:token:feedback",
)  # fmt: skip
COLUMNS = (
    ("cache", 24, ""),
    ("perplexity", 10, ".4f"),
    ("over 16-bit", 11, "+.4f"),
    ("KL", 9, ".6f"),
    ("bytes", 12, ",d"),
    ("bits", 6, ".3f"),
    ("s", 6, ".0f"),
)


def parse(name: str) -> tuple[Spec, str]:
    """(Spec, search) of a CACHE."""
    kind, scales, *marks = name.split(":")
    asymmetric = "asym" in marks
    search = next((mark for mark in marks if mark in SEARCHES), "absmax")
    if kind not in ("fp8", "int8", "int4") or set(marks) - {"asym", FEEDBACK, *SEARCHES}:
        raise SystemExit(f"{name} is not KIND:SCALES[:asym][:SEARCH][:feedback], see --help")
    grid = E4M3 if kind == "fp8" else IntGrid(int(kind[3:]), signed=not asymmetric)
    if scales in ("tensor", "head"):
        group = PER_TENSOR if scales == "tensor" else PER_CHANNEL
        return Spec(grid, group, scale=torch.float32), search
    group = PER_CHANNEL if scales == "token" else (1, int(scales.removeprefix("g")))
    return Spec(grid, group, asymmetric=asymmetric, mode="dynamic"), search


def calibrate(model: Any, tokens_NT: torch.Tensor) -> dict[int, Seen]:
    """What every attention's keys and values look like on the calibration text."""
    with torch.no_grad(), observing(model) as observer:
        for window in tokens_NT:
            model(input_ids=window[None], use_cache=True, logits_to_keep=1)
    return {one.layer: one for one in observer.seen.values()}


def factory(
    model: Any, name: str, seen: dict[int, Seen], feedback: dict[int, Sequence[Feedback]]
) -> Callable[[], Any]:
    """Makes empty caches of one kind."""
    if name == SIXTEEN:
        return lambda: DynamicCache(config=model.config)
    spec, search = parse(name)
    scales = {}
    if spec.mode == "static":
        scales = {layer: one.scales(spec, search) for layer, one in seen.items()}
    feedback = feedback if FEEDBACK in name else {}
    return lambda: QuantizedKVCache(model.config, spec, scales, feedback)


def measured_bytes(model: Any, cache: Any, tokens: int) -> int:
    """Bytes a cache holds after ``tokens`` tokens of one sequence."""
    probe = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=probe)
    for layer, plain in enumerate(probe.layers):
        shape = (*plain.keys.shape[:2], tokens, plain.keys.shape[3])
        cache.update(torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), layer)
    if isinstance(cache, QuantizedKVCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", default="pydoc", help="a text, for static scales")
    parser.add_argument("--caches", nargs="+", default=list(CACHES), metavar="CACHE")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512, help="of calibration")
    parser.add_argument("--windows", type=int, default=40, help="of evaluation")
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="that bytes are measured for")
    parser.add_argument("--kl", action="store_true", help="divergence from 16 bits; twice as long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="kv-cache", help="of the results file")
    parser.add_argument("--again", action="store_true", help="measure rows that are known too")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, print everything asked for."""
    args = arguments()
    results = Results(args.name)
    model, tokenizer = load(resolve(args.model).folder)
    windows = evaluation_windows(
        tokenize(tokenizer, read_text(args.text)), args.windows, args.evaluation_length
    )
    seen: dict[int, Seen] = {}
    feedback: dict[int, Sequence[Feedback]] = {}
    table = Table(*COLUMNS)
    plain: Row = {}
    for name in (SIXTEEN, *args.caches):
        static = name != SIXTEEN and parse(name)[0].mode == "static"
        key: Row = {
            "cache": name,
            "calibration": f"{Path(args.calibration).name} {args.samples}x{args.sequence_length}"
            if static or FEEDBACK in name
            else "",
            "evaluate": f"{Path(args.text).name} {args.windows}x{args.evaluation_length}",
            "tokens": args.tokens,
        }
        row = None if args.again else results.find(key)
        if row is None or (args.kl and row.get("kl_divergence") is None):
            if (static and not seen) or (FEEDBACK in name and not feedback):
                ids = tokenize(tokenizer, read_text(args.calibration))
                chosen, _ = calibration_windows(ids, args.samples, args.sequence_length, args.seed)
                seen = calibrate(model, chosen) if static and not seen else seen
                feedback = key_feedback(model, chosen[:FEEDBACK_WINDOWS])
            new_cache = factory(model, name, seen, feedback)
            start = time.perf_counter()
            scored = evaluate_model(
                model, windows, new_cache=new_cache, reference=model if args.kl else None
            )
            row = {
                "perplexity": scored.perplexity,
                "kl_divergence": scored.kl_divergence,
                "seconds": round(time.perf_counter() - start, 1),
                "bytes": measured_bytes(model, new_cache(), args.tokens),
            }
            results.add(key, row)
        plain = plain or row
        table.row(
            name, row["perplexity"], row["perplexity"] - plain["perplexity"],
            row.get("kl_divergence"), row["bytes"],
            16 * row["bytes"] / plain["bytes"], row["seconds"],
        )  # fmt: skip


if __name__ == "__main__":
    main()
