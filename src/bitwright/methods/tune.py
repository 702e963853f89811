"""Gradients for what is left to learn once codes are fixed: the scales.

With codes fixed, a quantized weight is linear in its scales, so no straight-through
estimator is needed: d loss / d scale_og = sum over the group's columns of
d loss / d weight_oi * level_oi, level being the stored integer minus its zero point.
Inputs of low bits are rounded as at run time, with a gradient of one.
Scales are learned as logarithms (their signs are kept), against the divergence
KL(original || quantized) of the whole model's predictions.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bitwright.errors import BadRequest
from bitwright.numerics.grids import E5M2, Grid, IntGrid
from bitwright.numerics.rounding import decode
from bitwright.schemes.inputs import straight_through_input
from bitwright.schemes.quantized import QuantizedLinear


class TunedLinear(nn.Module):
    """A Linear whose weight is level * scale, with the logarithm of |scale| as parameter."""

    def __init__(self, q: QuantizedLinear, bias_O: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        if q.spec.group[0] != 1 or not isinstance(q.spec.scale, torch.dtype):
            raise BadRequest(
                "scales can be tuned where each is a plain number of a part of one row"
            )
        level_OI = decode(q.codes_OI, q.spec.grid)
        groups = q.scale_RG.shape[1]
        if q.zero_point_RG is not None:
            zero_OG = q.zero_point_RG.float()
            level_OI = (level_OI.view(len(zero_OG), groups, -1) - zero_OG[..., None]).view_as(
                level_OI
            )
        self.original = q
        self.dtype = dtype
        self.bias_O = bias_O
        self.level_OGC = level_OI.to(_held_as(q.spec.grid, level_OI)).view(
            len(level_OI), groups, -1
        )
        scale_OG = q.scale_RG.float()
        self.sign_OG = scale_OG.sign()
        self.log_scale_OG = nn.Parameter(scale_OG.abs().log())

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, x rounded first if the layer's inputs are of low bits."""
        if self.original.input_spec is not None:
            x = straight_through_input(x, self.original.input_spec, self.original.input_scale)
        scale_OG = self.sign_OG * self.log_scale_OG.exp()
        y: Tensor = _ScaledMatmul.apply(x, self.level_OGC, scale_OG.to(self.dtype))  # type: ignore[no-untyped-call]
        return y if self.bias_O is None else y + self.bias_O

    def result(self) -> QuantizedLinear:
        """The same codes with the learned scales, at storage precision."""
        scale_OG = (self.sign_OG * self.log_scale_OG.exp()).detach()
        return replace(self.original, scale_RG=scale_OG.to(self.original.scale_RG.dtype))


class _ScaledMatmul(torch.autograd.Function):
    """y = x (level * scale)ᵀ; the weight is rebuilt in the backward pass, never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level_OGC: Tensor, scale_OG: Tensor) -> Tensor:
        ctx.save_for_backward(x, level_OGC, scale_OG)
        return linear(x, _weight(level_OGC, scale_OG))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor]:
        x, level_OGC, scale_OG = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        weight_OI = _weight(level_OGC, scale_OG)
        grad_x = (grad @ weight_OI).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight_OI = grad.T @ x.reshape(-1, x.shape[-1])
        grad_scale_OG = (grad_weight_OI.view(level_OGC.shape) * level_OGC.to(grad.dtype)).sum(-1)
        return grad_x, None, grad_scale_OG


def _held_as(grid: Grid, level_OI: Tensor) -> torch.dtype:
    """The smallest dtype in which levels are exact: a byte but for wide zero points."""
    if isinstance(grid, IntGrid):
        return torch.int8 if level_OI.abs().max() <= 127 else torch.int16
    return torch.float8_e5m2 if grid == E5M2 else torch.float8_e4m3fn  # holds E2M1 as well


def _weight(level_OGC: Tensor, scale_OG: Tensor) -> Tensor:
    return (level_OGC.to(scale_OG.dtype) * scale_OG[..., None]).view(len(level_OGC), -1)


def divergence_and_gradient(
    hidden_TD: Tensor, target_TD: Tensor, output_VD: Tensor, *, rows: int = 128
) -> tuple[float, Tensor]:
    """(KL(original || quantized) summed over tokens, its gradient by ``hidden``).

    ``hidden`` and ``target``: last hidden states of the quantized and the original model,
    ``output``: the output embedding they share. Logits exist for ``rows`` tokens at a time.
    """
    total = 0.0
    grad_TD = torch.empty_like(hidden_TD)
    for start in range(0, len(hidden_TD), rows):
        part = slice(start, start + rows)
        log_p = linear(target_TD[part], output_VD).float().log_softmax(-1)
        log_q = linear(hidden_TD[part], output_VD).float().log_softmax(-1)
        p = log_p.exp()
        total += float(torch.dot(p.view(-1), log_p.sub_(log_q).view(-1)))
        grad_TD[part] = log_q.exp_().sub_(p).to(hidden_TD.dtype) @ output_VD
    return total, grad_TD
