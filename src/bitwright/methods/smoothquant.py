"""SmoothQuant: move the outliers of activations into the weights.

y = (W diag(s)) (diag(1/s) x) with s_j = max|x_j|^a / max|W_:j|^(1-a), folded into whatever
produces x (Xiao et al. 2022, "SmoothQuant", section 4). The strength a is given, or searched
on an estimate of the two rounding errors it trades against each other.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bitwright.methods.awq import InputScale, scaled_error, shared_mean
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

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
    input_bits: int = 8,
    grid: int = GRID,
    shared_I: Tensor | None = None,
) -> InputScale:
    """The strength of least estimated error, over 0, 1/grid, ..., 1; no change is allowed too.

    Weight rounding is measured exactly (`scaled_error`). Input rounding is estimated as
    uniform noise of step max|x/s| / (2^(b-1) - 1) on every channel of the scaled input:
    step² / 12 * |W diag(s)|².
    """
    ones = torch.ones_like(stats.absmax_I, dtype=torch.float32)
    before = _error(weights_OI, stats, spec, ones, input_bits)
    best = InputScale(ones, 0.0, before, before)
    for step in range(grid + 1):
        strength = step / grid
        scale_I = smooth_scale(weights_OI, stats, strength, shared_I=shared_I)
        error = _error(weights_OI, stats, spec, scale_I, input_bits)
        if error < best.error:
            best = InputScale(scale_I, strength, error, before)
    return best


def _error(
    weights_OI: Sequence[Tensor], stats: InputStats, spec: Spec, scale_I: Tensor, input_bits: int
) -> float:
    step = float((stats.absmax_I / scale_I).max()) / ((1 << (input_bits - 1)) - 1)
    power = math.fsum(float((w * scale_I).square().sum()) for w in weights_OI)
    error = scaled_error(weights_OI, stats, spec, scale_I, "absmax")
    return error + step * step / 12 * power
