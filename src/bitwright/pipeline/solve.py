"""From a block's statistics to codes: which scale, which solver, and what if it fails."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import NotPositiveDefinite
from bitwright.methods.awq import InputScale, awq_scale
from bitwright.methods.compose import Fold as FoldName
from bitwright.methods.compose import parse_method
from bitwright.methods.gptq import gptq
from bitwright.methods.kquant import kquant
from bitwright.methods.objective import row_errors
from bitwright.methods.obq import obq
from bitwright.methods.ranges import input_scale
from bitwright.methods.rtn import rtn
from bitwright.methods.smoothquant import smooth_scale, smoothquant_scale
from bitwright.pipeline.report import LayerReport
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.plan import Plan
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec
from bitwright.schemes.stats import InputStats

LARGEST_DAMP = 1.0
JUDGED_ROWS = 128


def solve_layers(
    weights: Mapping[str, Tensor],
    stats: InputStats | None,
    plan: Plan,
    *,
    fold: float | None = None,
) -> list[tuple[str, QuantizedLinear, LayerReport]]:
    """The Linears of one shared input by the plan's method, with their lines of the report.

    Rows are solved independently of each other, so the weights are stacked and share one
    factorization (and one scale, where the spec has one per tensor, as runtimes that fuse these
    Linears expect); only 2-D blocks keep to their own weight. A hessian that has no Cholesky
    factor is damped ten times more, up to LARGEST_DAMP; after that the layers are rounded to
    nearest. Either is reported.
    """
    first = plan.quantized[next(iter(weights))]
    assert first.scheme is not None
    scheme = first.scheme
    if scheme.weight.group[0] > 1 and len(weights) > 1:
        alone = [solve_layers({n: w}, stats, plan, fold=fold) for n, w in weights.items()]
        return [line for lines in alone for line in lines]
    parts_OI = list(weights.values())
    stacked_OI = torch.cat(parts_OI) if len(parts_OI) > 1 else parts_OI[0]
    stacked, fallback = _solve(stacked_OI, stats, scheme.weight, plan.method, plan.options)
    out = []
    start = 0
    for name, weight_OI in weights.items():
        rows = slice(start, start + len(weight_OI))
        start += len(weight_OI)
        q = stacked.rows(rows)
        row = LayerReport(
            name=name,
            shape=q.shape,
            scheme=scheme.name,
            method=plan.method,
            bits_per_weight=q.bits_per_weight,
            error=_error(weight_OI, q, stats),
            measured="weight" if stats is None else "output",
            fold=fold,
            fallback=fallback,
        )
        out.append((name, q, row))
    return out


def _error(weight_OI: Tensor, q: QuantizedLinear, stats: InputStats | None) -> float:
    """Relative output error, from JUDGED_ROWS evenly spread rows where there are more.

    Judging every row would take as long as solving them.
    """
    every = slice(None, None, -(-len(weight_OI) // JUDGED_ROWS))
    judged_OI = dequantize(q.rows(every)) if q.spec.group[0] == 1 else dequantize(q)[every]
    error_O, power_O = row_errors(
        weight_OI[every], judged_OI, None if stats is None else stats.hessian_II
    )
    power = float(power_O.sum())
    return float(error_O.sum()) / power if power > 0 else 0.0


def input_of(
    stats: InputStats | None, spec: Spec | None, options: Mapping[str, Any]
) -> Tensor | None:
    """The calibrated input scale (1,) where the spec has one."""
    if spec is None or not needs_calibrated_scale(spec):
        return None
    assert stats is not None
    return input_scale(stats, spec, options["input_range"])


def _solve(
    weight_OI: Tensor,
    stats: InputStats | None,
    spec: Spec,
    method: str,
    options: Mapping[str, Any],
) -> tuple[QuantizedLinear, str]:
    solver, search = parse_method(method).solver, options["search"]
    if spec.super_blocks and (solver == "rtn" or stats is None):
        return kquant(weight_OI, stats, spec), ""
    if solver == "rtn" or stats is None:
        return rtn(weight_OI, stats, spec, search=search), ""
    damp, fallback = float(options["damp"]), ""
    while damp <= LARGEST_DAMP:
        try:
            if spec.super_blocks:
                return kquant(weight_OI, stats, spec, damp=damp), fallback
            if solver == "obq":
                q = obq(weight_OI, stats, spec, damp=damp, search=search, order="pivot")
                return q, fallback
            q = gptq(weight_OI, stats, spec, damp=damp, order=options["order"], search=search)
            return q, fallback
        except NotPositiveDefinite:
            damp *= 10
            fallback = f"damping raised to {damp:g}"
    note = "round-to-nearest: hessian not definite"
    if spec.super_blocks:
        return kquant(weight_OI, stats, spec), note
    return rtn(weight_OI, stats, spec, search=search), note


def choose_input_scale(
    kind: FoldName,
    weights_OI: list[Tensor],
    stats: InputStats,
    scheme: Scheme,
    options: Mapping[str, Any],
    shared_I: Tensor,
) -> InputScale:
    """The channel scale that AWQ or SmoothQuant would fold in front of these Linears."""
    spec = scheme.weight
    if spec.super_blocks:  # near enough for the search of a channel scale
        spec = replace(spec, scale=torch.float16)
    if kind == "awq":
        return awq_scale(weights_OI, stats, spec, shared_I=shared_I)
    strength = options["smoothing"]
    if strength is None:
        return smoothquant_scale(
            weights_OI, stats, spec, input_spec=scheme.input, shared_I=shared_I
        )
    scale_I = smooth_scale(weights_OI, stats, strength, shared_I=shared_I)
    return InputScale(scale_I, strength, 0.0, 0.0)
