"""How close one block's quantization comes to the arithmetic it cannot avoid, at three widths.

A random Llama checkpoint of the reference model's block, 1x, 2x and 4x as wide, is quantized by
the pipeline as users run it, and the seconds between progress reports are those of one block:
read, statistics, solve, replay, write. The first block, which compiles and warms, is not counted.

The floor, from rates measured in the same run at the same shapes, best of several:
  forward   two passes over the tokens (statistics; what the next block sees): every Linear and
            causal attention, at the bfloat16 matmul rate; without the last Linear of the first
            pass, whose outputs nobody needs
  gram      tokens * I * (I + 1) operations per distinct input, at the bfloat16 matmul rate
  factor    2/3 I^3 operations per distinct input, at the float32 matmul rate
  solve     O * I^2 operations per Linear, at the float32 matmul rate

    python benchmarks/scaling.py --widths 1 2 4 --samples 16 --sequence-length 512
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from parts import Parts
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright import api
from bitwright.pipeline.gram import add_gram

BLOCKS = 4  # the first warms up; the last is not timed, since its end is not reported


def write_model(folder: Path, width: int) -> Any:
    """A random Llama of BLOCKS blocks, ``width`` times as wide as the reference model's."""
    config = LlamaConfig(
        hidden_size=576 * width,
        intermediate_size=1536 * width,
        num_attention_heads=9 * width,
        num_key_value_heads=3 * width,
        num_hidden_layers=BLOCKS,
        vocab_size=1024,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return config


def shapes(config: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """((outputs, inputs) of every Linear of a block, widths of the distinct inputs)."""
    d, m = config.hidden_size, config.intermediate_size
    kv = d // config.num_attention_heads * config.num_key_value_heads
    return [(d, d), (kv, d), (kv, d), (d, d), (m, d), (m, d), (d, m)], [d, d, d, m]


def best(function: Callable[[], object], repeats: int = 7) -> float:
    """Least seconds of several calls, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def rates(config: Any, rows: int) -> dict[str, float]:
    """Operations per second: bfloat16 and float32 matmul, and add_gram, at the block's shapes."""
    d, m = config.hidden_size, config.intermediate_size
    x_bf, w_bf = torch.randn(rows, d).bfloat16(), torch.randn(m, d).bfloat16()
    x_32, w_32 = torch.randn(m, 128), torch.randn(128, d)
    gram = torch.zeros(d, d)
    with torch.no_grad():
        return {
            "bfloat16": 2 * rows * d * m / best(lambda: torch.nn.functional.linear(x_bf, w_bf)),
            "float32": 2 * m * 128 * d / best(lambda: x_32 @ w_32),
            "add_gram": rows * d * (d + 1) / best(lambda: add_gram(gram, x_bf)),
        }


def operations(config: Any, samples: int, length: int) -> dict[str, float]:
    """Operations of one block, by part of the floor."""
    linears, inputs = shapes(config)
    tokens = samples * length
    weights = sum(o * i for o, i in linears)
    attention = 2 * samples * length * (length + 1) * config.hidden_size
    return {
        "forward": 2.0 * tokens * (2 * weights - linears[-1][0] * linears[-1][1]) + 2 * attention,
        "gram": sum(float(tokens) * i * (i + 1) for i in inputs),
        "factor": sum(2 / 3 * i**3 for i in inputs),
        "solve": sum(float(o) * i * i for o, i in linears),
    }


def quantize(model: Path, out: Path, args: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds of the faster of the timed blocks, and its parts."""
    prepared = api.prepare(
        model,
        scheme="W4A16",
        method=args.method,
        group_size=64,
        calibration="random tokens",
        samples=args.samples,
        sequence_length=args.sequence_length,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1024, (args.samples, args.sequence_length), generator=generator)
    marks: list[tuple[float, dict[str, float]]] = []
    parts = Parts()
    with parts.installed():
        api.quantize_checkpoint(
            prepared.source,
            prepared.topology,
            out,
            prepared.plan,
            prepared.fmt,
            tokens_NT=tokens,
            progress=lambda *_: marks.append((time.perf_counter(), dict(parts.seconds))),
        )
    blocks = []
    for (start, before), (end, after) in itertools.pairwise(marks[1:BLOCKS]):
        spent = {name: after[name] - before.get(name, 0.0) for name in after}
        blocks.append((end - start, spent | {"other": end - start - sum(spent.values())}))
    return min(blocks, key=lambda block: block[0])


def main() -> None:
    """Measure every width."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--name", default="scaling", help="of the results file, which is replaced")
    args = parser.parse_args()
    results = Results(args.name, fresh=True)
    for width in args.widths:
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            config = write_model(Path(folder) / "model", width)
            rate = rates(config, rows=2048)
            seconds, spent = quantize(Path(folder) / "model", Path(folder) / "out", args)
        work = operations(config, args.samples, args.sequence_length)
        floor = {
            part: work[part] / rate["bfloat16" if part in ("forward", "gram") else "float32"]
            for part in work
        }
        least = sum(floor.values())
        row: Row = {
            "seconds_per_block": seconds,
            "floor": floor,
            "floor_seconds": least,
            "ratio": seconds / least,
            "ratio_with_add_gram": seconds
            / (least - floor["gram"] + work["gram"] / rate["add_gram"]),
            "rates": rate,
            "operations": work,
            "parts": dict(sorted(spent.items(), key=lambda item: -item[1])),
        }
        results.add({"width": width, "tokens": args.samples * args.sequence_length}, row)
        report(width, config, row)


def report(width: int, config: Any, row: Row) -> None:
    """Print one width: rates, floor, and where the time went."""
    rate = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in row["rates"].items())
    print(f"\n{width}x: {config.hidden_size}/{config.intermediate_size}; GFLOP/s: {rate}")
    print(
        f"{row['seconds_per_block']:.3f} s per block, floor {row['floor_seconds']:.3f} s: "
        f"ratio {row['ratio']:.2f} ({row['ratio_with_add_gram']:.2f} with add_gram at its own rate)"
    )
    print("floor  " + "  ".join(f"{name} {value:.3f}" for name, value in row["floor"].items()))
    table = Table(("part", 14, ""), ("s", 7, ".3f"), ("share", 6, ".0%"))
    for name, value in row["parts"].items():
        table.row(name, value, value / row["seconds_per_block"])


if __name__ == "__main__":
    main()
