"""SmoothQuant: move the outliers of activations into the weights.

y = (W diag(s)) (diag(1/s) x) with s_j = max|x_j|^a / max|W_:j|^(1-a), folded into whatever
produces x (Xiao et al. 2022, "SmoothQuant", section 4). The strength a is given, or searched
on the two rounding errors it trades against each other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.methods.awq import InputScale, scaled_error, shared_mean
from bitwright.methods.ranges import input_scale
from bitwright.schemes.inputs import needs_calibrated_scale, round_input
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats, scaled_stats

GRID = 20


def smooth_scale(
    weights_OI: Sequence[Tensor],
    stats: InputStats,
    strength: float,
    *,
    shared_I: Tensor | None = None,
) -> Tensor:
    """s_j = max|x_j|^a / max|W_:j|^(1-a) over all the Linears, centred on one."""
    weight_I = torch.stack([w.abs().amax(0) for w in weights_OI]).amax(0).float().clamp(min=1e-5)
    input_I = stats.absmax_I.float().clamp(min=1e-5)
    if shared_I is not None:
        weight_I, input_I = shared_mean(weight_I, shared_I), shared_mean(input_I, shared_I)
    scale_I = (input_I.pow(strength) / weight_I.pow(1 - strength)).clamp(min=1e-5)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def smoothquant_scale(
    weights_OI: Sequence[Tensor],
    stats: InputStats,
    spec: Spec,
    *,
    input_spec: Spec | None,
    grid: int = GRID,
    shared_I: Tensor | None = None,
) -> InputScale:
    """The strength of least error, over 0, 1/grid, ..., 1; no change is allowed too.

    The error is that of rounding the weights (`scaled_error`) plus that of rounding the inputs
    as ``input_spec`` says, measured on the sampled inputs: mean |W diag(s) (x/s - Q(x/s))|².
    With 16-bit inputs (None) only weights count.
    """
    ones = torch.ones_like(stats.absmax_I, dtype=torch.float32)
    before = _error(weights_OI, stats, spec, ones, input_spec)
    best = InputScale(ones, 0.0, before, before)
    for step in range(grid + 1):
        strength = step / grid
        scale_I = smooth_scale(weights_OI, stats, strength, shared_I=shared_I)
        error = _error(weights_OI, stats, spec, scale_I, input_spec)
        if error < best.error:
            best = InputScale(scale_I, strength, error, before)
    return best


def _error(
    weights_OI: Sequence[Tensor],
    stats: InputStats,
    spec: Spec,
    scale_I: Tensor,
    input_spec: Spec | None,
) -> float:
    error = scaled_error(weights_OI, stats, spec, scale_I, "absmax")
    if input_spec is None:
        return error
    if stats.sample_TI is None:
        raise BadRequest("smoothing low-bit inputs needs a sample of them")
    scaled = scaled_stats(stats, scale_I)
    assert scaled.sample_TI is not None
    calibrated = needs_calibrated_scale(input_spec)
    scale = input_scale(scaled, input_spec) if calibrated else None
    lost_TI = scaled.sample_TI - round_input(scaled.sample_TI, input_spec, scale)
    return error + math.fsum(
        float((lost_TI @ (weight * scale_I).T).square().sum()) / len(lost_TI)
        for weight in weights_OI
    )
