"""The shares of this CPU's peaks that kernels reach, for `bitwright plan`.

Peaks first (as the device HERE has them), then every kind of kernel: one row of inputs, which waits
for weights, and many, which compute. Weights are read from memory, not from caches. The kernels'
results go into benchmarks/results/ and, named as measured, into the package's measured.json.

    python benchmarks/planner_shares.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from cpu_w4a16 import CACHE_BYTES, medians
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.kernels.cpu_w4a16 import w4a16
from bitwright.kernels.cpu_w8a8 import w8a8_int8
from bitwright.kernels.layouts import pack_eight_bits, pack_for_cpu
from bitwright.methods.rtn import rtn
from bitwright.planning.efficiency import kernels
from bitwright.planning.hardware import Device, overheads
from bitwright.planning.here import measured_here
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import parse_scheme

MEASURED = Path(__file__).parents[1] / "src/bitwright/planning/measured.json"
NAME = "planner-shares"
ROWS, COLUMNS = 4096, 11008
MANY = 256
HEADS, WIDTH, CONTEXT = 8, 128, 16384
Call = Callable[[], object]


def products(seconds: float) -> dict[str, tuple[float, float]]:
    """Kernel -> (bytes per second for one row of inputs, operations per second for many)."""
    four, eight = (parse_scheme(name) for name in ("W4A16", "W8A8-INT8"))
    weight = torch.randn(ROWS, COLUMNS)
    q4 = rtn(weight, None, four.weight, search="absmax")
    q8 = replace(rtn(weight, None, eight.weight, search="absmax"), input_spec=eight.input)
    dense = dequantize(q4, torch.bfloat16)
    makers: dict[str, tuple[float, Callable[[], Any], Callable[..., Any]]] = {
        "16-bit": (16.0, dense.clone, linear),
        "weight-only": (q4.bits_per_weight, lambda: pack_for_cpu(q4), w4a16),
        "8-bit": (q8.bits_per_weight, lambda: pack_eight_bits(q8), w8a8_int8),
    }
    found = {}
    for name, (bits, make, product) in makers.items():
        size = bits * ROWS * COLUMNS / 8
        copies = [make() for _ in range(int(CACHE_BYTES / size) + 2)]
        spent = {}
        for batch in (1, MANY):
            x = torch.randn(batch, COLUMNS).bfloat16()
            calls: dict[str, list[Call]] = {name: [partial(product, x, w) for w in copies]}
            spent[batch] = medians(calls, seconds)[name]
        found[name] = (size / spent[1], 2.0 * MANY * ROWS * COLUMNS / spent[MANY])
    return found


def attention(seconds: float) -> tuple[float, float]:
    """(bytes per second of one query over a long cache, operations per second of a prefill)."""
    shape = (1, HEADS, CONTEXT, WIDTH)
    caches = [tuple(torch.randn(shape).bfloat16() for _ in range(2)) for _ in range(3)]
    one = torch.randn(1, HEADS, 1, WIDTH).bfloat16()
    reading: dict[str, list[Call]] = {
        "read": [partial(scaled_dot_product_attention, one, *cache) for cache in caches]
    }
    read = medians(reading, seconds)["read"]
    many = [torch.randn(1, HEADS, 1024, WIDTH).bfloat16() for _ in range(3)]
    computing: dict[str, list[Call]] = {
        "compute": [partial(scaled_dot_product_attention, *many, is_causal=True)]
    }
    compute = medians(computing, seconds)["compute"]
    pairs = 1024 * 1025 / 2
    return 2 * HEADS * CONTEXT * WIDTH * 2 / read, 4 * HEADS * WIDTH * pairs / compute


def launch_seconds(tokens: int = 24) -> float:
    """Per kernel of a block, by what ten more tiny blocks cost a generated token."""
    spent = {}
    for blocks in (2, 12):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=blocks, vocab_size=256,
            num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
        )  # fmt: skip
        model, best = LlamaForCausalLM(config).eval(), float("inf")
        for _ in range(4):
            start = time.perf_counter()
            with torch.no_grad():
                model.generate(
                    input_ids=torch.ones(1, 8, dtype=torch.int64), do_sample=False,
                    attention_mask=torch.ones(1, 8, dtype=torch.int64),
                    max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
                )  # fmt: skip
            best = min(best, time.perf_counter() - start)
        spent[blocks] = best / tokens
    return (spent[12] - spent[2]) / 10 / overheads().kernels_per_block


def rows(here: Device, seconds: float) -> list[Row]:
    """A row per kernel: shares of the peaks, at most 1."""
    launch = launch_seconds()
    found: list[Row] = []
    for name, (read, operations) in products(seconds).items():
        peak = here.rates["INT8"] if name == "8-bit" else here.rate_16_bit
        found.append(_row(name, read / here.bandwidth, operations / peak, launch))
    read, operations = attention(seconds)
    found.append(_row("attention", read / here.bandwidth, operations / here.rate_16_bit, None))
    return found


def _row(kernel: str, bandwidth: float, compute: float, launch: float | None) -> Row:
    row: Row = {
        "device": "CPU",
        "kernel": kernel,
        "bandwidth": round(min(bandwidth, 1.0), 3),
        "compute": round(min(compute, 1.0), 3),
    }
    return row if launch is None else row | {"launch_seconds": round(launch, 7)}


def distil(results: dict[str, Any]) -> dict[str, Any]:
    """What the package carries of a results file."""
    machine = results["machine"]
    source = (
        f"benchmarks/results/{NAME}.json: {machine['cores']} cores of {machine['cpu']}, "
        f"{results['date']}"
    )
    keys = ("device", "kernel", "bandwidth", "compute", "launch_seconds")
    picked = [{key: row[key] for key in keys if key in row} for row in results["rows"]]
    return {"kernels": [row | {"source": source} for row in picked]}


def main() -> None:
    """Measure, print beside what was there before, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="per kernel and batch")
    args = parser.parse_args()
    here = measured_here()
    print(f"{here.bandwidth / 1e9:.1f} GB/s, {here.rate_16_bit / 1e12:.2f} and INT8 "
          f"{here.rates['INT8'] / 1e12:.2f} teraops: {here.source}")  # fmt: skip
    before = kernels(here)
    results = Results(NAME, fresh=True)
    table = Table(("kernel", 12, ""), ("bandwidth", 9, ".3f"), ("compute", 9, ".3f"),
                  ("before", 7, ".3f"), ("before", 7, ".3f"))  # fmt: skip
    peaks = {"bandwidth_peak": here.bandwidth, "rates": dict(here.rates)}
    for row in rows(here, args.seconds):
        results.add({"device": "CPU", "kernel": row["kernel"]}, row | peaks)
        old = before[row["kernel"]]
        table.row(row["kernel"], row["bandwidth"], row["compute"],
                  old.bandwidth.value, old.compute.value)  # fmt: skip
    kept = json.loads(results.path.read_text(encoding="utf-8"))
    MEASURED.write_text(json.dumps(distil(kept), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
