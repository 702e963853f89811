"""Gradients through rounding: forward the rounded value, backward as if nothing was rounded.

The straight-through estimator (Bengio et al. 2013, arXiv:1308.3432). Where a value was clamped
to the end of its grid, rounding does not follow it any more, and neither does the gradient.
"""

from typing import Any

import torch
from torch import Tensor


class _PassThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if inside is None else (inside,)))
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad, saved = grads[0], ctx.saved_tensors  # once: recomputed activations are gone then
        return (grad * saved[0] if saved else grad), None, None


def pass_through(x: Tensor, value: Tensor, inside: Tensor | None = None) -> Tensor:
    """``value`` (the rounded ``x``, same shape and dtype), with ``x``'s gradient where ``inside``.

    ``inside``: boolean mask, shape of ``x``; None: everywhere.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    passed: Tensor = _PassThrough.apply(x, value.detach(), inside)  # type: ignore[no-untyped-call]
    return passed
