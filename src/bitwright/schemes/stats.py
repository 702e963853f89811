"""What calibration learns about the input of a Linear."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStats:
    """Statistics of the vectors x that a Linear receives.

    ``hessian_II``: mean over tokens of x xᵀ, float32 (the layer error's Hessian without its
    factor 2); ``absmean_I`` and ``absmax_I``: per input channel; ``tokens``: how many were seen.
    For input scales, where they are asked for: ``batch_absmax_BI``, absmax of every batch, and
    ``sample_TI``, some of the vectors themselves.
    """

    hessian_II: Tensor
    absmean_I: Tensor
    absmax_I: Tensor
    tokens: int
    batch_absmax_BI: Tensor | None = None
    sample_TI: Tensor | None = None


def merge(a: InputStats, b: InputStats) -> InputStats:
    """Statistics of the union of two sets of tokens."""
    total = a.tokens + b.tokens
    share_a, share_b = a.tokens / total, b.tokens / total
    return InputStats(
        hessian_II=(a.hessian_II * share_a).add_(b.hessian_II * share_b),
        absmean_I=a.absmean_I * share_a + b.absmean_I * share_b,
        absmax_I=torch.maximum(a.absmax_I, b.absmax_I),
        tokens=total,
        batch_absmax_BI=_both(a.batch_absmax_BI, b.batch_absmax_BI),
        sample_TI=_both(a.sample_TI, b.sample_TI),
    )


def scaled_stats(stats: InputStats, scale_I: Tensor) -> InputStats:
    """Statistics of x / s."""
    inverse_I = 1.0 / scale_I
    batches, sample = stats.batch_absmax_BI, stats.sample_TI
    return InputStats(
        hessian_II=stats.hessian_II * inverse_I[:, None] * inverse_I,
        absmean_I=stats.absmean_I * inverse_I,
        absmax_I=stats.absmax_I * inverse_I,
        tokens=stats.tokens,
        batch_absmax_BI=None if batches is None else batches * inverse_I,
        sample_TI=None if sample is None else sample * inverse_I,
    )


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])
