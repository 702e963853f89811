"""AWQ's founding observation (Lin et al. 2023, table 1): which 1% of the channels matter?

Every Linear is rounded to nearest, but 1% of its input channels keep their 16 bits: those of the
largest mean |activation|, of the largest weights (column norm), or drawn at random. Activations
are those of the unquantized model over the calibration windows.

    python benchmarks/salient.py --model REFERENCE --text test.txt --calibration valid.txt
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Results, Row, Table
from torch import Tensor, nn

from bitwright.api import calibration_tokens, load_tokenizer, resolve
from bitwright.evaluation.perplexity import evaluate_model
from bitwright.methods.rtn import rtn
from bitwright.pipeline.texts import evaluation_windows, read_text, tokenize
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import load_model
from bitwright.schemes.plan import Calibration
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Spec, parse_scheme

BATCH = 4


def mean_absolute_inputs(
    model: nn.Module, linears: Mapping[str, nn.Linear], tokens_NT: Tensor
) -> dict[str, Tensor]:
    """Mean |x| per input channel of every Linear."""
    sums: dict[str, Tensor] = {}

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total_I = inputs[0].abs().flatten(0, -2).sum(0, dtype=torch.float32)
        sums[name] = sums[name] + total_I if name in sums else total_I

    handles = [
        linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()
    ]
    with torch.no_grad():
        for batch in tokens_NT.split(BATCH):
            model.base_model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: total / tokens_NT.numel() for name, total in sums.items()}


def kept_channels(
    rule: str, weight_OI: Tensor, absmean_I: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """The input channels that ``rule`` leaves in 16 bits, at least one unless the rule is none."""
    if rule == "none":
        return torch.empty(0, dtype=torch.int64)
    score_I = {
        "activation": absmean_I,
        "weight": weight_OI.float().norm(dim=0),
        "random": torch.rand(weight_OI.shape[1], generator=generator),
    }[rule]
    return score_I.topk(max(1, math.ceil(share * weight_OI.shape[1]))).indices


def patch(
    linears: Mapping[str, nn.Linear],
    originals: Mapping[str, Tensor],
    absmean: Mapping[str, Tensor],
    rule: str,
    spec: Spec,
    args: argparse.Namespace,
    seed: int,
) -> int:
    """Put rounded weights into the model, kept channels as they were; how many were kept."""
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for name, linear in linears.items():
        original_OI = originals[name]
        quantized = rtn(original_OI.float(), None, spec, search=args.search)
        rounded_OI = dequantize(quantized, original_OI.dtype)
        keep = kept_channels(rule, original_OI, absmean[name], args.share, generator)
        rounded_OI[:, keep] = original_OI[:, keep]
        linear.weight = nn.Parameter(rounded_OI, requires_grad=False)
        count += keep.numel()
    return count


def load(args: argparse.Namespace) -> tuple[Any, dict[str, nn.Linear], Tensor, Tensor]:
    """The model, its blocks' Linears, and the windows to calibrate on and to score."""
    checkpoint = resolve(args.model)
    source = Calibration(args.calibration, args.samples, args.sequence_length)
    calibration, _ = calibration_tokens(checkpoint, source, args.seed)
    text = tokenize(load_tokenizer(checkpoint), read_text(args.text))
    model = load_model(checkpoint)
    names = [name for block in discover(checkpoint).linears for name in block]
    linears = {name: model.get_submodule(name) for name in names}
    windows = evaluation_windows(text, args.windows, args.evaluation_length)
    return model, linears, calibration, windows


def main() -> None:
    """Measure every rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", default="pydoc", help="a text, or pydoc")
    parser.add_argument("--scheme", default="W3A16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--search", choices=("mse", "absmax"), default="mse")
    parser.add_argument("--share", type=float, default=0.01, help="of the channels kept")
    parser.add_argument("--random", type=int, default=3, help="how many random draws")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="salient", help="of the results file, which is replaced")
    args = parser.parse_args()
    spec = parse_scheme(args.scheme).with_weight(group_size=args.group_size).weight
    model, linears, calibration, windows = load(args)
    originals = {name: linear.weight.data for name, linear in linears.items()}
    absmean = mean_absolute_inputs(model, linears, calibration)
    total = sum(weight.shape[1] for weight in originals.values())

    results = Results(args.name, fresh=True)
    table = Table(
        ("kept by", 12, ""), ("draw", 4, "d"), ("kept", 6, ".2%"), ("perplexity", 10, ".2f")
    )
    rules = [("none", 0), ("activation", 0), ("weight", 0)]
    rules += [("random", draw) for draw in range(args.random)]
    for rule, draw in rules:
        count = patch(linears, originals, absmean, rule, spec, args, args.seed + draw)
        perplexity = evaluate_model(model, windows).perplexity
        key: Row = {"kept_by": rule, "draw": draw}
        settings = {"scheme": args.scheme, "group_size": args.group_size, "search": args.search}
        settings |= {"text": Path(args.text).name, "calibration": Path(args.calibration).name}
        results.add(key, {**settings, "share": count / total, "perplexity": perplexity})
        table.row(rule, draw, count / total, perplexity)


if __name__ == "__main__":
    main()
