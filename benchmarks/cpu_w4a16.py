"""The CPU's W4A16 product against torch's bfloat16 product and torch's own int4 operator.

Medians of calls that take turns in one run; every call reads another of several copies of the
weight, so that it comes from memory and not from the caches. The result is checked first.

    python benchmarks/cpu_w4a16.py --shapes 4096x4096 11008x4096 4096x11008
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from common import Results, Row, Table
from torch import Tensor
from torch.nn.functional import linear

from bitwright.kernels import reference
from bitwright.kernels.cpu_w4a16 import w4a16, why_not_compiled
from bitwright.kernels.layouts import pack_for_cpu
from bitwright.methods.rtn import rtn
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import parse_scheme

CACHE_BYTES = 96e6  # more than the last-level cache shares out


def torch_int4(weight_OI: Tensor, group_size: int) -> Callable[[Tensor], Tensor]:
    """torch's own operator, on codes of the same size."""
    rows, cols = weight_OI.shape
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.rand(cols // group_size, rows, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)


def medians(calls: dict[str, list[Callable[[], object]]], seconds: float) -> dict[str, float]:
    """Median seconds of a call of each kind; kinds take turns, and so do a kind's copies."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for name, copies in calls.items():
            call = copies[turn % len(copies)]
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Every shape and batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"], help="OxI")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape and batch")
    parser.add_argument(
        "--name", default="cpu-w4a16", help="of the results file, which is replaced"
    )
    args = parser.parse_args()
    if why_not_compiled():
        print(f"no compiled kernel here: {why_not_compiled()}")
    scheme = parse_scheme("W4A16").with_weight(group_size=args.group_size)
    results = Results(args.name, fresh=True)
    table = Table(
        ("shape", 12, ""), ("M", 5, "d"), ("bf16 ms", 9, ".3f"), ("torch int4", 10, ".2f"),
        ("bitwright", 10, ".2f"), ("GB/s", 6, ".1f"), ("GFLOP/s", 8, ".0f"),
    )  # fmt: skip
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        weight = torch.randn(rows, cols)
        q = rtn(weight, None, scheme.weight, search="absmax")
        packed = pack_for_cpu(q)
        x = torch.randn(3, cols).bfloat16()
        off = (w4a16(x, packed).float() - reference.linear(x, q).float()).abs()
        assert (off <= reference.tolerance(x, q, 8e-3)).all(), "the product is wrong"
        copies = max(2, int(CACHE_BYTES / (rows * cols / 2)) + 1)
        ours = [pack_for_cpu(q) for _ in range(copies)]
        dense = [dequantize(q, torch.bfloat16) for _ in range(max(2, copies // 4))]
        theirs = [torch_int4(weight, args.group_size) for _ in range(copies)]
        for batch in args.batches:
            x = torch.randn(batch, cols).bfloat16()
            found = medians(
                {
                    "bf16": [partial(linear, x, weight) for weight in dense],
                    "torch_int4": [partial(call, x) for call in theirs],
                    "bitwright": [partial(w4a16, x, weight) for weight in ours],
                },
                args.seconds,
            )
            key: Row = {"shape": shape, "batch": batch, "group_size": args.group_size}
            key["threads"] = torch.get_num_threads()
            ratios = {name: found["bf16"] / value for name, value in found.items()}
            results.add(key, {"seconds": found, "speedup": ratios})
            table.row(
                shape, batch, found["bf16"] * 1e3, ratios["torch_int4"], ratios["bitwright"],
                q.bits_per_weight * rows * cols / 8e9 / found["bitwright"],
                2 * batch * rows * cols / 1e9 / found["bitwright"],
            )  # fmt: skip


if __name__ == "__main__":
    main()
