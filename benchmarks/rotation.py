"""W4A4 in INT4, plain and rotated: what rotations save.

Weights in groups, activations of every Linear in the blocks rounded per token at run time.

    python benchmarks/rotation.py --model REFERENCE --text test.txt --calibration valid.txt

A VARIANT of the model is plain, r1, r1+r2, r1+r2+r4 (Hadamard blocks that compressed-tensors can
express) or r1+r2+r4full; INPUTS are 16 (not rounded), sym or asym, each with an optional clipping
ratio: sym:0.9, and mse for a ratio chosen per token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, Table
from torch import Tensor, nn

from bitwright import api
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.scales import minmax_scale
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.rotation import rotate_checkpoint
from bitwright.pipeline.texts import evaluation_windows, read_text, tokenize
from bitwright.pipeline.topology import discover

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)


def rounded(x_TI: Tensor, *, asymmetric: bool, ratio: float) -> Tensor:
    """Every token rounded to INT4 with a scale of its own, in float32."""
    if asymmetric:
        scale, low = minmax_scale(x_TI, IntGrid(4, signed=False), ratio)
        scale = scale.clamp(min=1e-9)
        zero = (-low / scale).round().clamp(0, 15)
        return ((x_TI / scale).round().add(zero).clamp(0, 15) - zero) * scale
    scale = (x_TI.abs().amax(-1, keepdim=True) * (ratio / 7)).clamp(min=1e-9)
    return (x_TI / scale).round().clamp(-8, 7) * scale


def rounding_hook(kind: str) -> Any:
    """A pre-hook that rounds what a Linear is given."""
    name, _, ratio = kind.partition(":")

    def best(x: Tensor) -> Tensor:
        if ratio != "mse":
            return rounded(x, asymmetric=name == "asym", ratio=float(ratio or 1))
        out, least = x, torch.full_like(x[:, :1], torch.inf)
        for each in RATIOS:
            new = rounded(x, asymmetric=name == "asym", ratio=each)
            error = (new - x).square().sum(-1, keepdim=True)
            out = torch.where(error < least, new, out)
            least = torch.minimum(error, least)
        return out

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        return (best(x.float().reshape(-1, x.shape[-1])).reshape(x.shape).to(x.dtype), *args[1:])

    return hook


def variant_of(model: Path, name: str, folder: Path) -> Path:
    """The rotated checkpoint a variant stands for."""
    if name == "plain":
        return model
    source = open_checkpoint(model)
    rotate_checkpoint(
        source,
        discover(source),
        folder,
        heads="r2" in name,
        online="r4" in name,
        blocks="full" if "r4full" in name else "power of two",
    )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--variants", nargs="+", default=["plain", "r1+r2+r4"])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--inputs", nargs="+", default=["16", "sym", "asym"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--name", default="rotation")
    parser.add_argument("--again", action="store_true")
    args = parser.parse_args()
    results = Results(args.name, fresh=args.again)
    tokens = tokenize(api.load_tokenizer(open_checkpoint(args.model)), read_text(args.text))
    windows = evaluation_windows(tokens, args.windows, args.evaluation_length)
    inside = [n for block in discover(open_checkpoint(args.model)).linears for n in block]
    table = Table(
        ("variant", 14, ""), ("weights", 9, ""), ("inputs", 9, ""), ("perplexity", 10, ".2f"),
        ("rotate s", 8, ".0f"), ("solve s", 8, ".0f"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=args.work, prefix="rotation-") as work:
        for variant in args.variants:
            start = time.perf_counter()
            source = variant_of(args.model, variant, Path(work) / variant)
            rotating = time.perf_counter() - start
            for method in args.methods:
                keys = [
                    {"variant": variant, "weights": method, "inputs": kind,
                     "group_size": args.group_size, "windows": len(windows)}
                    for kind in args.inputs
                ]  # fmt: skip
                solving, model = 0.0, None
                for key in keys:
                    row = results.find(key)
                    if row is None:
                        if model is None:
                            start = time.perf_counter()
                            model = quantized(source, method, Path(work) / "out", args)
                            solving = time.perf_counter() - start
                        perplexity = measured(model, key["inputs"], inside, windows)
                        row = {"perplexity": perplexity, "rotate_seconds": round(rotating, 1),
                               "solve_seconds": round(solving, 1)}  # fmt: skip
                        results.add(key, row)
                    table.row(variant, method, key["inputs"], row["perplexity"],
                              row["rotate_seconds"], row["solve_seconds"])  # fmt: skip


def quantized(source: Path, method: str, out: Path, args: argparse.Namespace) -> Any:
    """The model with its weights rounded by a method; "16" leaves them."""
    if method == "16":
        return api.load(source)[0]
    api.quantize(
        source, out, scheme="W4A16", method=method, group_size=args.group_size, overwrite=True,
        calibration=args.calibration if method != "rtn" else None, samples=args.samples,
        sequence_length=args.sequence_length,
    )  # fmt: skip
    return api.load(out)[0]


def measured(model: Any, kind: str, inside: list[str], windows: Tensor) -> float:
    """Perplexity with the inputs of the block's Linears rounded."""
    handles = []
    if kind != "16":
        handles = [
            model.get_submodule(name).register_forward_pre_hook(rounding_hook(kind))
            for name in inside
        ]
    try:
        return evaluate_model(model, windows).perplexity
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
