"""What calibration learns about the input of a Linear."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class InputStats:
    """Statistics of the vectors x that a Linear receives.

    ``hessian_II``: mean over tokens of x xᵀ, float32 (the layer error's Hessian without its
    factor 2); ``absmean_I`` and ``absmax_I``: per input channel; ``tokens``: how many were seen.
    """

    hessian_II: Tensor
    absmean_I: Tensor
    absmax_I: Tensor
    tokens: int


def merge(a: InputStats, b: InputStats) -> InputStats:
    """Statistics of the union of two sets of tokens."""
    total = a.tokens + b.tokens
    share_a, share_b = a.tokens / total, b.tokens / total
    return InputStats(
        hessian_II=a.hessian_II * share_a + b.hessian_II * share_b,
        absmean_I=a.absmean_I * share_a + b.absmean_I * share_b,
        absmax_I=torch.maximum(a.absmax_I, b.absmax_I),
        tokens=total,
    )
