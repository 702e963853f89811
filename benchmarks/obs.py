"""OBQ in two orders against GPTQ and round-to-nearest: the tables of docs/methods-obs.md.

Relative output error trace((W-Q) H (W-Q)ᵀ) / trace(W H Wᵀ) with damping 0.01 and the same scales
(search "mse") for all, on random layers whose inputs are correlated in four ways, and on the first
rows of one block of a real model.

    python benchmarks/obs.py --model REFERENCE --calibration valid.txt --block 12
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import Results, Row, Table
from torch import Tensor

from bitwright.api import calibration_tokens, resolve
from bitwright.methods.gptq import gptq
from bitwright.methods.objective import relative_output_error
from bitwright.methods.obq import obq
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import load_model
from bitwright.schemes.plan import Calibration
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

Solver = Callable[[Tensor, InputStats, Spec], QuantizedLinear]
SOLVERS: dict[str, Solver] = {
    "obq error": partial(obq, order="error"),
    "obq pivot": partial(obq, order="pivot"),
    "gptq": gptq,
    "nearest": rtn,
    "obq error, no outlier rule": partial(obq, order="error", outliers=False),
}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj")


def stats_of(x_TI: Tensor) -> InputStats:
    """The statistics of given inputs (T, I)."""
    return InputStats(x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), x_TI.abs().amax(0), len(x_TI))


def neighbours(cols: int, generator: torch.Generator) -> Tensor:
    """Inputs of one size, each correlated 0.8 with the one before."""
    x_TI = torch.randn(8 * cols, cols, generator=generator)
    for i in range(1, cols):
        x_TI[:, i] = 0.8 * x_TI[:, i - 1] + 0.6 * x_TI[:, i]
    return x_TI


def mixed(cols: int, generator: torch.Generator) -> Tensor:
    """Independent causes, mixed by a random matrix."""
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5
    return torch.randn(4 * cols, cols, generator=generator) @ mixing


def few_causes(cols: int, generator: torch.Generator) -> Tensor:
    """A quarter as many causes as inputs, plus a little noise."""
    mixing = torch.randn(cols // 4, cols, generator=generator)
    causes = torch.randn(4 * cols, cols // 4, generator=generator)
    return causes @ mixing + 0.1 * torch.randn(4 * cols, cols, generator=generator)


def log_normal(cols: int, generator: torch.Generator) -> Tensor:
    """Mixed inputs whose sizes are log-normal."""
    return mixed(cols, generator) * torch.randn(cols, generator=generator).exp()


FAMILIES = {
    "one size, neighbours correlated 0.8": neighbours,
    "randomly mixed": mixed,
    "a quarter as many causes, plus noise": few_causes,
    "mixed, sizes log-normal": log_normal,
}


def errors(
    weight_OI: Tensor, stats: InputStats, spec: Spec
) -> tuple[dict[str, float], dict[str, float]]:
    """(relative output error, seconds) of every solver."""
    found, seconds = {}, {}
    for name, solver in SOLVERS.items():
        start = time.perf_counter()
        q = solver(weight_OI, stats, spec)
        seconds[name] = time.perf_counter() - start
        found[name] = float(relative_output_error(weight_OI, dequantize(q), stats.hessian_II))
    return found, seconds


def random_layers(args: argparse.Namespace, results: Results) -> None:
    """Means over ``--layers`` random layers of 8 x 32."""
    table = Table(
        ("inputs", 38, ""), ("bits", 4, "d"), *((name, len(name), ".5f") for name in SOLVERS)
    )
    for family, make in FAMILIES.items():
        for bits in (4, 2):
            total = dict.fromkeys(SOLVERS, 0.0)
            spec = Spec(IntGrid(bits), (1, 16), scale=torch.float32)
            for seed in range(args.layers):
                generator = torch.Generator().manual_seed(seed)
                stats = stats_of(make(32, generator))
                weight = torch.randn(8, 32, generator=generator)
                found, _ = errors(weight, stats, spec)
                total = {name: total[name] + found[name] / args.layers for name in total}
            key: Row = {"inputs": family, "bits": bits, "layers": args.layers}
            results.add(key, {"error": total})
            table.row(family, bits, *total.values())


def real_layers(args: argparse.Namespace, results: Results) -> None:
    """The first rows of four Linears of one block, inputs from the unquantized model."""
    checkpoint = resolve(args.model)
    source = Calibration(args.calibration, args.samples, args.sequence_length)
    tokens, _ = calibration_tokens(checkpoint, source, seed=0)
    model = load_model(checkpoint)
    prefix = discover(checkpoint).block_names[args.block]
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(f"{prefix}.{name}").register_forward_pre_hook(
            lambda _, inputs, kept=seen[name]: kept.append(inputs[0].flatten(0, -2).float())
        )
    with torch.no_grad():
        for batch in tokens.split(4):
            model.base_model(input_ids=batch, use_cache=False)
    table = Table(
        ("layer", 18, ""), ("bits", 4, "d"), *((name, len(name), ".5f") for name in SOLVERS)
    )
    for name in LAYERS:
        stats = stats_of(torch.cat(seen[name]))
        weight_OI = model.get_parameter(f"{prefix}.{name}.weight").data[: args.rows].float()
        for bits in (4, 3):
            spec = Spec(IntGrid(bits), (1, 64), scale=torch.bfloat16)
            found, seconds = errors(weight_OI, stats, spec)
            key: Row = {"layer": name, "block": args.block, "bits": bits}
            key["calibration"] = Path(args.calibration).name
            results.add(key, {"rows": len(weight_OI), "error": found, "seconds": seconds})
            table.row(name, bits, *found.values())


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a Llama-like checkpoint; without it only random layers")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--block", type=int, default=12)
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--layers", type=int, default=40, help="random layers per mean")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--name", default="obs", help="of the results file, which is replaced")
    args = parser.parse_args()
    results = Results(args.name, fresh=True)
    random_layers(args, results)
    if args.model:
        real_layers(args, results)


if __name__ == "__main__":
    main()
