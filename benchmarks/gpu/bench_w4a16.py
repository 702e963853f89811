"""The Triton products on a GPU: built, checked, timed against what torch has, in one command.

    python benchmarks/gpu/bench_w4a16.py --limit 540            # W4A16, within nine minutes
    python benchmarks/gpu/bench_w4a16.py --tune --limit 540     # try tiles first, use the best
    python benchmarks/gpu/bench_w4a16.py --kind w8a8 --name gpu-w8a8   # INT8, FP8, FP8 128-blocks
    python benchmarks/gpu/bench_w4a16.py --kind fp4 --name gpu-fp4     # NVFP4 and MXFP4 weights
    python benchmarks/gpu/bench_w4a16.py --dry                  # no GPU: tiny, all kinds, no times

Every time is the median of CUDA-event timings of single calls. Calls rotate among so many copies of
the weight that together they are four times the L2 cache: weights come from memory, as in a model.
Ratios are to torch's bfloat16 product in the same run. GB/s counts weights, scales, input and
output; ceilings (a large copy, a large bfloat16 product) are measured first, and each row says
what share of them it reaches. Shapes are (out, in). W8A8 includes rounding the inputs; the rows
"codes given" leave it out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from common import RESULTS, Results, Row, Table

SHAPES = {
    "Llama-2-7B qkv": (12288, 4096), "Llama-2-7B o": (4096, 4096),
    "Llama-2-7B gate_up": (22016, 4096), "Llama-2-7B down": (4096, 11008),
    "Llama-3-8B qkv": (6144, 4096), "Llama-3-8B gate_up": (28672, 4096),
    "Llama-3-8B down": (4096, 14336), "Llama-2-70B qkv": (10240, 8192),
    "Llama-2-70B gate_up": (57344, 8192), "Llama-2-70B down": (8192, 28672),
    "square": (8192, 8192), "wide": (32768, 8192),
}  # fmt: skip
FIRST = ("square", "wide")  # the goals are set on these: they are measured first
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
DRY = {"tiny": (96, 256)}
CANDIDATES = [
    (rows, channels, warps, stages)
    for rows in (16, 32, 64, 128)
    for channels in (64, 128, 256)
    for warps in (4, 8)
    for stages in (3, 4, 5)
]
Call = Callable[[torch.Tensor, int], object]


def timed(call: Call, x: torch.Tensor, copies: int, seconds: float) -> float:
    """Median seconds of one call; call(x, i) reads copy i of its weight."""
    for i in range(3):
        call(x, i % copies)
    torch.cuda.synchronize()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        marks = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(20)]
        for i, (before, after) in enumerate(marks):
            before.record()
            call(x, (len(times) + i) % copies)
            after.record()
        torch.cuda.synchronize()
        times += [before.elapsed_time(after) / 1e3 for before, after in marks]
    return statistics.median(times)


def ceilings(seconds: float) -> Row:
    """Bytes per second of a copy, operations per second of a bfloat16 product."""
    big = torch.empty(1 << 29, dtype=torch.int16, device="cuda")
    other = torch.empty_like(big)
    copy = timed(lambda _, i: other.copy_(big), big, 1, seconds)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = timed(lambda x, i: x @ a, a, 1, seconds)
    return {"copy_bytes_per_s": 2 * big.nbytes / copy, "bf16_flop_per_s": 2 * 8192**3 / product}


SCHEMES = {
    "w4a16": {"bitwright": "W4A16"},
    "fp4": {"nvfp4": "NVFP4A16", "mxfp4": "MXFP4"},
    "w8a8": {"int8": "W8A8-INT8", "fp8": "W8A8-FP8", "fp8 block": "W8A8-FP8"},
}


def layer(shape: tuple[int, int], kind: str, name: str, group_size: int, device: str) -> Any:
    """A random layer, made where it is used."""
    from bitwright.numerics.groups import scale_shape
    from bitwright.schemes.quantized import assemble
    from bitwright.schemes.scheme import parse_scheme

    scheme = parse_scheme(SCHEMES[kind][name])
    if kind == "w4a16":
        scheme = scheme.with_weight(group_size=group_size)
    elif name == "fp8 block":
        scheme = scheme.with_granularity("block")
    spec = scheme.weight
    codes = torch.randint(0, 1 << spec.grid.bits, shape, dtype=torch.uint8, device=device)
    if kind == "w8a8" and name != "int8":
        codes[codes & 0x7F == 0x7F] = 0  # not a number
    scale = torch.rand(scale_shape(shape, spec.group), device=device) * 0.02 + 0.001
    factor = torch.tensor(0.5) if spec.two_level else None
    q = assemble(codes, spec, scale, None, factor)
    return q if kind != "w8a8" else replace(q, input_spec=scheme.input)


def contenders(
    layers: dict[str, Any], copies: int, group_size: int
) -> dict[str, tuple[Call | None, str]]:
    """Name -> (call, "") or (None, why it is not measured); the first is what others count by."""
    from bitwright.kernels.dispatch import pack, product
    from bitwright.kernels.triton_w8a8 import product as codes_product
    from bitwright.kernels.triton_w8a8 import quantize_tokens
    from bitwright.schemes.quantized import dequantize

    q = next(iter(layers.values()))
    rows, cols = q.shape
    dense = dequantize(q, torch.bfloat16)
    dense_copies = [dense.clone() for _ in range(copies)]
    found: dict[str, tuple[Call | None, str]] = {
        "bf16": (lambda x, i: torch.nn.functional.linear(x, dense_copies[i]), ""),
    }
    for name, one in layers.items():
        packed = [pack(one, "cuda") for _ in range(copies)]
        found[name] = (lambda x, i, packed=packed: product(x, packed[i]), "")
        if one.input_spec is not None:
            last: dict[str, Any] = {}

            def given(
                x: torch.Tensor, i: int, packed: Any = packed, last: dict[str, Any] = last
            ) -> object:
                w = packed[i]
                if last.get("x") is not x:
                    blocks = w.scale.ndim == 2
                    last["codes"] = quantize_tokens(x, w.codes_OI.dtype, blocks=blocks)
                    last["x"] = x
                return codes_product(*last["codes"], w, x.dtype)

            found[f"{name}, codes given"] = (given, "")
    if q.codes_OI.device.type != "cuda":
        return found
    try:
        nibbles = q.codes_OI[:, ::2] << 4 | q.codes_OI[:, 1::2] & 15
        words = torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)
        size = cols if group_size == -1 else group_size
        grids = torch.rand(cols // size, rows, 2, device="cuda", dtype=torch.bfloat16)
        int4 = [words.clone() for _ in range(copies)]
        found["torch int4"] = (
            lambda x, i: torch.ops.aten._weight_int4pack_mm(x, int4[i], size, grids), ""
        )  # fmt: skip
    except (RuntimeError, AttributeError) as error:
        found["torch int4"] = (None, str(error).splitlines()[0])
    try:
        eight = [dense.to(torch.float8_e4m3fn) for _ in range(copies)]
        scale_1N = torch.ones(1, rows, device="cuda")

        def fp8(x: torch.Tensor, i: int) -> object:
            scale_M1 = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-6) / 448
            codes = (x / scale_M1).to(torch.float8_e4m3fn)
            return torch._scaled_mm(
                codes, eight[i].t(), scale_a=scale_M1, scale_b=scale_1N, out_dtype=torch.bfloat16
            )

        fp8(torch.randn(16, cols, device="cuda", dtype=torch.bfloat16), 0)
        found["fp8 torch"] = (fp8, "")
    except (RuntimeError, AttributeError) as error:
        found["fp8 torch"] = (None, str(error).splitlines()[0])
    return found


def check(q: Any, call: Call, batch: int) -> float:
    """The largest error over what the specification allows; raises if above one."""
    from bitwright.kernels.reference import linear, tolerance

    x = torch.randn(batch, q.shape[1], device=q.codes_OI.device, dtype=torch.bfloat16)
    height = min(512, q.shape[0])  # rows of the weight that the specification is computed for
    found = call(x, 0)
    assert isinstance(found, torch.Tensor)
    few = q.rows(slice(0, height)) if q.spec.group[0] in (1, -1) else q
    wanted = linear(x, few)
    off = (found[:, : wanted.shape[1]].float() - wanted.float()).abs() / tolerance(x, few, 8e-3)
    worst = float(off.max())
    if worst > 1:
        raise SystemExit(f"wrong result at {q.shape}, batch {batch}: {worst:.2f} times too far off")
    return worst


def tune(q: Any, batches: Sequence[int], copies: int, deadline: float) -> list[Row]:
    """The fastest tile per batch, tried on one shape."""
    from bitwright.kernels import triton_w4a16
    from bitwright.kernels.layouts import pack_for_gpu

    packed = [pack_for_gpu(q) for _ in range(copies)]
    before, best = triton_w4a16.TILES, []
    for batch in (b for b in batches if b < triton_w4a16.EXPANDED_FROM):
        x = torch.randn(batch, q.shape[1], device="cuda", dtype=torch.bfloat16)
        found: list[tuple[float, tuple[int, ...]]] = []
        for candidate in CANDIDATES:
            if candidate[0] > max(16, 2 * batch) or time.perf_counter() > deadline:
                continue
            triton_w4a16.TILES = ((1 << 30, triton_w4a16.Tile(*candidate)),)
            try:
                call: Call = lambda x, i: triton_w4a16.w4a16(x, packed[i])  # noqa: E731
                found.append((timed(call, x, copies, 0.05), candidate))
            except Exception as error:  # what does not compile or fit is no candidate
                print(f"    {candidate}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        if found:
            seconds, tile = min(found)
            best.append({"batch": batch, "tile": tile, "seconds": seconds, "tried": len(found)})
    triton_w4a16.TILES = before
    return best


def use(best: Sequence[Row]) -> None:
    """Let the kernel take the tuned tiles; the last one serves larger batches too."""
    from bitwright.kernels import triton_w4a16

    tiles = [(row["batch"], triton_w4a16.Tile(*row["tile"])) for row in best]
    if tiles:
        triton_w4a16.TILES = (*tiles[:-1], (1 << 30, tiles[-1][1]))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Times faster than bfloat16 by batch, one line per shape and kernel of ours."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    ours = [row for row in rows if "error_of_allowed" in row]
    for name, kernel in dict.fromkeys((row["shape"], row["kernel"]) for row in ours):
        points = [(r["batch"], r["times_bf16"]) for r in ours
                  if (r["shape"], r["kernel"]) == (name, kernel)]  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {kernel}", linewidth=1)
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", xlabel="rows of the input", ylabel="times faster than bfloat16")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def dry() -> None:
    """Everything but the timing, through Triton's interpreter."""
    for name, shape in DRY.items():
        for kind, group_size in (("w4a16", 32), ("w4a16", 128), ("fp4", 0), ("w8a8", 0)):
            layers = {ours: layer(shape, kind, ours, group_size, "cpu") for ours in SCHEMES[kind]}
            calls = contenders(layers, 1, group_size)
            for ours, q in layers.items():
                call, _ = calls[ours]
                assert call is not None
                for batch in (1, 17):
                    print(f"{name} {shape} {kind} {ours} M={batch}: {check(q, call, batch):.2f} of "
                          "the allowed error")  # fmt: skip
    print("dry run: nothing was timed")


def main() -> None:
    """Ceilings, tiles if asked, then every shape and batch until the time is up."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="no GPU: check, time nothing")
    parser.add_argument("--tune", action="store_true", help="try tiles on the square shape first")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything")
    parser.add_argument("--seconds", type=float, default=0.1, help="per kernel, shape and batch")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--kind", choices=list(SCHEMES), default="w4a16")
    parser.add_argument("--group-size", type=int, default=128, help="of W4A16")
    parser.add_argument("--name", default="gpu-w4a16", help="of the results file, replaced")
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        dry()
        return
    if not torch.cuda.is_available():
        raise SystemExit("no GPU here: --dry checks the kernel without one")
    deadline = time.perf_counter() + args.limit
    results = Results(args.name, fresh=True)
    device = torch.cuda.get_device_properties(0)
    results.machine |= {
        "gpu": device.name, "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size, "cuda": torch.version.cuda, **ceilings(args.seconds),
    }  # fmt: skip
    print({key: results.machine[key] for key in ("gpu", "copy_bytes_per_s", "bf16_flop_per_s")})
    order = [*FIRST, *(name for name in SHAPES if name not in FIRST)]
    table = Table(("shape", 20, ""), ("M", 5, "d"), ("kernel", 22, ""), ("us", 9, ".1f"),
                  ("x bf16", 7, ".2f"), ("GB/s", 7, ".0f"), ("TFLOP/s", 8, ".1f"),
                  ("of ceiling", 10, ".2f"))  # fmt: skip
    for name in order:
        shape = SHAPES[name]
        layers = {ours: layer(shape, args.kind, ours, args.group_size, "cuda")
                  for ours in SCHEMES[args.kind]}  # fmt: skip
        per_weight = {ours: q.bits_per_weight / 8 for ours, q in layers.items()}
        packed_bytes = shape[0] * shape[1] * min(per_weight.values())
        copies = max(2, min(64, round(4 * device.L2_cache_size / packed_bytes) + 1))
        if args.tune and name == order[0] and args.kind == "w4a16":
            best = tune(
                layers["bitwright"], args.batches, copies, time.perf_counter() + args.limit / 3
            )
            results.machine["tiles"] = best
            use(best)
        calls = contenders(layers, copies, args.group_size if args.kind == "w4a16" else 128)
        for batch in args.batches:
            if time.perf_counter() > deadline:
                print(f"the time is up at {name}, batch {batch}; raise --limit for the rest")
                plot(results.rows, RESULTS / f"{args.name}.svg")
                return
            off = {}
            for ours, q in layers.items():
                call, _ = calls[ours]
                assert call is not None
                off[ours] = check(q, call, batch)
            x = torch.randn(batch, shape[1], device="cuda", dtype=torch.bfloat16)
            base = None
            for kernel, (call, why) in calls.items():
                key: Row = {"shape": name, "batch": batch, "kernel": kernel}
                if call is None:
                    results.add(key, {"not_measured": why})
                    continue
                try:
                    seconds = timed(call, x, copies, args.seconds)
                except RuntimeError as error:  # a baseline that refuses this shape or batch
                    results.add(key, {"not_measured": str(error).splitlines()[0]})
                    continue
                base = seconds if base is None else base
                known = {"bf16": 2.0, "fp8 torch": 1.0, "torch int4": 0.5 + 4 / 128}
                weight = known.get(kernel) or per_weight[kernel.partition(",")[0]]
                moved = shape[0] * shape[1] * weight + 2 * batch * sum(shape)
                row: Row = {
                    "seconds": seconds, "times_bf16": base / seconds, "out_in": list(shape),
                    "bytes_per_s": moved / seconds,
                    "flop_per_s": 2 * batch * shape[0] * shape[1] / seconds,
                }  # fmt: skip
                row["of_ceiling"] = max(
                    row["bytes_per_s"] / results.machine["copy_bytes_per_s"],
                    row["flop_per_s"] / results.machine["bf16_flop_per_s"],
                )
                if kernel in off:
                    row["error_of_allowed"] = off[kernel]
                results.add(key, row)
                table.row(name, batch, kernel, seconds * 1e6, base / seconds,
                          moved / seconds / 1e9, row["flop_per_s"] / 1e12,
                          row["of_ceiling"])  # fmt: skip
        del calls, layers, q
        torch.cuda.empty_cache()
    plot(results.rows, RESULTS / f"{args.name}.svg")


if __name__ == "__main__":
    main()
