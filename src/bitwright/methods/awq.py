"""AWQ: scale up the input channels that carry large activations before rounding.

y = W x = (W diag(s)) (diag(1/s) x). The right side quantizes W diag(s), so a channel with a
larger s is rounded more finely; diag(1/s) is folded into whatever produces x (`pipeline/
folds.py`), so nothing is added to the model. s = mean|x|^alpha, and alpha is searched on the
output error of all Linears that read the same x (Lin et al. 2023, "AWQ", section 3.2).

The error over the calibration tokens is exact, not sampled: with H the mean of x xᵀ,
mean |(W - Q) x|² = trace((W - Q) H (W - Q)ᵀ).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.methods.objective import output_error
from bitwright.methods.rtn import rounded
from bitwright.numerics.scales import Search
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

GRID = 20


@dataclass(frozen=True, eq=False)
class InputScale:
    """The channel scale chosen for one shared input, and what it was chosen by.

    ``scale_I`` float32, all ones where no exponent beats leaving the input alone; ``error``
    and ``error_before`` are summed over the Linears.
    """

    scale_I: Tensor
    alpha: float
    error: float
    error_before: float


def awq_scale(
    weights_OI: Sequence[Tensor],
    stats: InputStats,
    spec: Spec,
    *,
    grid: int = GRID,
    search: Search = "absmax",
    shared_I: Tensor | None = None,
) -> InputScale:
    """The channel scale for Linears with weights ``weights_OI`` (float32) fed by one input.

    Tries alpha = 0, 1/grid, ..., 1 and keeps the least output error of round-to-nearest.
    ``shared_I``: int64, columns that must share a scale have equal numbers (the channels of
    one key-value head that several query heads read); None lets every column have its own.
    """
    best: InputScale | None = None
    before = 0.0
    for step in range(grid + 1):
        alpha = step / grid
        scale_I = channel_scale(stats.absmean_I, alpha, shared_I)
        error = scaled_error(weights_OI, stats, spec, scale_I, search)
        if step == 0:
            before = error
        if best is None or error < best.error:
            best = InputScale(scale_I, alpha, error, before)
    assert best is not None
    return best


def channel_scale(absmean_I: Tensor, alpha: float, shared_I: Tensor | None = None) -> Tensor:
    """mean|x|^alpha, centred on one: divided by the geometric mean of its extremes."""
    magnitude_I = absmean_I.float().clamp(min=1e-4 * float(absmean_I.max()) + 1e-12)
    if shared_I is not None:
        magnitude_I = shared_mean(magnitude_I, shared_I)
    scale_I = magnitude_I.pow(alpha)
    return scale_I / (scale_I.max() * scale_I.min()).sqrt()


def shared_mean(value_I: Tensor, shared_I: Tensor) -> Tensor:
    """Every value replaced by the mean over the columns that share its number."""
    groups, shared_I = int(shared_I.max()) + 1, shared_I.to(value_I.device)
    total = value_I.new_zeros(groups).index_add_(0, shared_I, value_I)
    return (total / torch.bincount(shared_I))[shared_I]


def scaled_error(
    weights_OI: Sequence[Tensor], stats: InputStats, spec: Spec, scale_I: Tensor, search: Search
) -> float:
    """Output error of rounding every W diag(s), measured in the unscaled input."""
    error = 0.0
    importance_I = stats.hessian_II.diagonal() / scale_I.square()
    for weight_OI in weights_OI:
        q_OI = rounded(weight_OI * scale_I, spec, search=search, importance_I=importance_I)
        error += output_error(weight_OI, q_OI / scale_I, stats.hessian_II)
    return error
