"""What a scale for fewer values buys: error, number of scales and storage, on a model's own layers.

The weights of every Linear of a few blocks, and the inputs those Linears get from a text, are
rounded to nearest in INT8, INT4, FP8 (E4M3) and FP4 (E2M1) at every granularity:

  tensor       one scale
  channel      one per output channel of a weight
  token        one per token of an activation
  group G      one per G neighbouring input channels of one output channel or token
  block B      one per square of B x B values

Errors are relative: of the values, |W - W_q| / |W|, and of the Linear's output when only this
operand is rounded, |X W^T - X W_q^T| / |X W^T|; root of summed squares over the layers. A group
that does not divide a layer's input width leaves the layer out of that row; "layers" counts what
is in it, and a second table holds the layers in which every granularity fits. At the end the
layers are counted in which a step to more scales did not lower the error.

    python benchmarks/granularity.py --model REFERENCE --text valid.txt
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from torch import Tensor, nn

from bitwright.api import load_tokenizer, resolve
from bitwright.errors import BadShape
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import E2M1, E4M3, Grid, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, PER_TOKEN, Group, count_scales
from bitwright.pipeline.texts import evaluation_windows, read_text, tokenize
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import load_model
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Spec

GRIDS: dict[str, Grid] = {"INT8": IntGrid(8), "INT4": IntGrid(4), "FP8": E4M3, "FP4": E2M1}
GROUPS: list[tuple[str, Group]] = [("group 128", (1, 128)), ("group 64", (1, 64))]
GROUPS += [("group 32", (1, 32)), ("block 128", (128, 128))]
GRANULARITIES: dict[str, dict[str, Group]] = {
    "weight": {"tensor": PER_TENSOR, "channel": PER_CHANNEL, **dict(GROUPS)},
    "activation": {"tensor": PER_TENSOR, "token": PER_TOKEN, **dict(GROUPS)},
}
SCALES = {"weight": torch.bfloat16, "activation": torch.float32}
CHAINS = {  # in order of the number of scales
    "weight": ("tensor", "block 128", "channel", "group 128", "group 64", "group 32"),
    "activation": ("tensor", "block 128", "token", "group 128", "group 64", "group 32"),
}

Layer = tuple[Tensor, Tensor]  # weight_OI, input_TI


def layers_of(args: argparse.Namespace) -> dict[str, Layer]:
    """Weight and inputs, float32, of every Linear of some evenly spaced blocks."""
    checkpoint = resolve(args.model)
    text = tokenize(load_tokenizer(checkpoint), read_text(args.text))
    tokens_NT = evaluation_windows(text, args.windows, args.sequence_length)
    blocks = discover(checkpoint).linears
    chosen = torch.linspace(0, len(blocks) - 1, args.blocks).round().long().tolist()
    model = load_model(checkpoint)
    linears = {n: model.get_submodule(n) for block in sorted(set(chosen)) for n in blocks[block]}
    inputs: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs[name] = arguments[0].flatten(0, -2).float()

    handles = [
        linear.register_forward_pre_hook(partial(keep, name)) for name, linear in linears.items()
    ]
    with torch.no_grad():
        model.base_model(input_ids=tokens_NT, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: (linear.weight.data.float(), inputs[name]) for name, linear in linears.items()}


def measure(layer: Layer, operand: str, spec: Spec, search: Any) -> dict[str, float]:
    """Squared errors and norms of one layer, and what it stores."""
    weight_OI, input_TI = layer
    value = weight_OI if operand == "weight" else input_TI
    error = dequantize(rtn(value, None, spec, search=search)) - value
    output = error @ (input_TI if operand == "weight" else weight_OI).T
    shape = (value.shape[0], value.shape[1])
    return {
        "error": float(error.double().square().sum()),
        "norm": float(value.double().square().sum()),
        "output_error": float(output.double().square().sum()),
        "output_norm": float((input_TI @ weight_OI.T).double().square().sum()),
        "scales": count_scales(shape, spec.group),
        "bytes": spec.bits_per_value(shape) * value.numel() / 8,
        "values": value.numel(),
    }


def summed(parts: list[dict[str, float]]) -> Row:
    """Many layers as one."""
    total = {key: sum(part[key] for part in parts) for key in parts[0]}
    return {
        "layers": len(parts),
        "value_error": (total["error"] / total["norm"]) ** 0.5,
        "output_error": (total["output_error"] / total["output_norm"]) ** 0.5,
        "scales": int(total["scales"]),
        "bits_per_value": total["bytes"] * 8 / total["values"],
        "bytes": int(total["bytes"]),
    }


def exceptions(rows: list[Row]) -> list[Row]:
    """Steps to more scales, layer by layer, after which the error of the values is not lower."""
    found = []
    by_key = {(r["operand"], r["grid"], r["search"], r["granularity"]): r for r in rows}
    for operand, grid, search in dict.fromkeys(key[:3] for key in by_key):
        for coarse, fine in itertools.pairwise(CHAINS[operand]):
            first = by_key[operand, grid, search, coarse]["by_layer"]
            then = by_key[operand, grid, search, fine]["by_layer"]
            names = [name for name in then if name in first]
            counts: Row = {"layers": len(names)}
            for which in ("value", "output"):
                worse = [name for name in names if then[name][which] >= first[name][which]]
                counts[f"not_lower_{which}"] = len(worse)
            step = f"{coarse} to {fine}"
            found.append(
                {"operand": operand, "grid": grid, "step": step, "search": search, **counts}
            )
    return found


def main() -> None:
    """Measure every grid at every granularity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="pydoc", help="a text, or pydoc")
    parser.add_argument("--blocks", type=int, default=3, help="evenly spaced, first and last too")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--search", nargs="+", choices=("absmax", "mse"), default=["absmax"])
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--operands", nargs="+", choices=list(SCALES), default=list(SCALES))
    parser.add_argument("--out", default="granularity", help="name of the results file, replaced")
    args = parser.parse_args()
    results = Results(args.out, fresh=True)
    layers = layers_of(args)
    settings = {"text": Path(args.text).name, "tokens": args.windows * args.sequence_length}
    columns = [("operand", 10, ""), ("grid", 4, ""), ("scales by", 11, ""), ("search", 6, "")]
    columns += [("layers", 6, "d"), ("values", 8, ".3%"), ("output", 8, ".3%")]
    columns += [("scales", 8, ","), ("bits", 7, ".3f"), ("bytes", 11, ",")]
    table = Table(*columns)
    comparable: list[tuple[Row, Row]] = []
    for operand, grid, search in itertools.product(args.operands, args.grids, args.search):
        measured: dict[str, dict[str, dict[str, float]]] = {}
        for granularity, group in GRANULARITIES[operand].items():
            spec = Spec(GRIDS[grid], group, scale=SCALES[operand])
            measured[granularity] = {}
            for name, layer in layers.items():
                try:
                    measured[granularity][name] = measure(layer, operand, spec, search)
                except BadShape:
                    continue
        common = set.intersection(*(set(found) for found in measured.values()))
        for granularity, found in measured.items():
            if not found:
                continue
            key: Row = {"operand": operand, "grid": grid, "search": search}
            key["granularity"] = granularity
            row = summed(list(found.values()))
            inside = summed([found[name] for name in common]) if common else {}
            by_layer = {
                name: {
                    "value": (part["error"] / part["norm"]) ** 0.5,
                    "output": (part["output_error"] / part["output_norm"]) ** 0.5,
                }
                for name, part in found.items()
            }
            results.add(key, {**settings, **row, "common": inside, "by_layer": by_layer})
            comparable.append((key, inside))
            table.row(operand, grid, granularity, search, *row.values())
    print("\nlayers in which every granularity fits")
    table = Table(*columns)
    for key, inside in comparable:
        if inside:
            cells = inside.values()
            table.row(key["operand"], key["grid"], key["granularity"], key["search"], *cells)
    print("\nsteps to more scales: in how many layers the error does not get lower")
    table = Table(
        *columns[:2], ("step", 24, ""), *columns[3:5], ("values", 6, "d"), ("output", 6, "d")
    )
    for row in exceptions(results.rows):
        if row["not_lower_value"] or row["not_lower_output"]:
            table.row(*row.values())


if __name__ == "__main__":
    main()
