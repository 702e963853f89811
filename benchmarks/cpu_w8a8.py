"""The CPU's W8A8-INT8 product, rounding of its inputs included, against torch's bfloat16 product.

Medians of calls that take turns in one run, weights read from memory (see cpu_w4a16.py). The
result is checked first.

    python benchmarks/cpu_w8a8.py --shapes 4096x4096 4096x11008
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch
from common import Results, Table
from cpu_w4a16 import CACHE_BYTES, medians
from torch.nn.functional import linear

from bitwright.kernels import reference
from bitwright.kernels.cpu_w8a8 import w8a8_int8
from bitwright.kernels.layouts import pack_eight_bits
from bitwright.methods.rtn import rtn
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import parse_scheme


def main() -> None:
    """Every shape and batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"], help="OxI")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape and batch")
    parser.add_argument("--name", default="cpu-w8a8", help="of the results file, which is replaced")
    args = parser.parse_args()
    scheme = parse_scheme("W8A8-INT8")
    results = Results(args.name, fresh=True)
    table = Table(("shape", 12, ""), ("M", 5, "d"), ("bf16 ms", 9, ".3f"), ("bitwright", 10, ".2f"))
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        q = rtn(torch.randn(rows, cols), None, scheme.weight, search="absmax")
        q = replace(q, input_spec=scheme.input)
        x = torch.randn(3, cols)
        torch.testing.assert_close(
            w8a8_int8(x, pack_eight_bits(q)), reference.linear(x, q), rtol=1e-3, atol=1e-2
        )
        dense = dequantize(q, torch.bfloat16)
        plain = [dense.clone() for _ in range(max(1, round(CACHE_BYTES / dense.nbytes)))]
        packed = [pack_eight_bits(q) for _ in range(max(1, round(CACHE_BYTES / q.codes_OI.nbytes)))]
        for batch in args.batches:
            x = torch.randn(batch, cols).bfloat16()
            found = medians(
                {
                    "bf16": [partial(linear, x, weight) for weight in plain],
                    "bitwright": [partial(w8a8_int8, x, weight) for weight in packed],
                },
                args.seconds,
            )
            ratio = found["bf16"] / found["bitwright"]
            results.add(
                {"shape": shape, "batch": batch, "threads": torch.get_num_threads()},
                {"seconds": found, "times_bf16": ratio},
            )
            table.row(shape, batch, found["bf16"] * 1e3, ratio)


if __name__ == "__main__":
    main()
