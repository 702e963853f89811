"""Keys and values as codes and scales: what a quantized cache stores of one batch of tokens.

Codes take one byte each; two 4-bit codes share a byte, the first in its low half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import BadShape
from bitwright.numerics.feedback import Feedback, feedback_codes
from bitwright.numerics.grids import E4M3, Grid
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import choose_scale
from bitwright.schemes.scheme import Spec


@dataclass(frozen=True, eq=False)
class States:
    """Rounded keys or values, token axis third.

    ``codes``: uint8 (B, H, T, D), or (B, H, T, D/2) for 4 bits. ``scale``: (B, H, T, G) in the
    spec's dtype, ``zero_point``: uint8 codes of the same shape; None where they do not exist.
    """

    codes: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None


def quantize_states(
    x_BHTD: Tensor,
    spec: Spec,
    scale_H: Tensor | None,
    feedback_H: Sequence[Feedback] | None = None,
) -> States:
    """Round keys or values of any float dtype; ``scale_H``: float32 (1,) or (H,) if static.

    To nearest, or with ``feedback_H``, one per head.
    """
    x = x_BHTD.float().contiguous()
    if scale_H is not None:
        scale = scale_H.view(-1, 1, 1)
        if feedback_H is None:
            return States(_pack(_codes(x / scale, spec.grid), spec.grid))
        return States(_pack(_with_feedback(x, scale, None, feedback_H, spec.grid), spec.grid))
    assert isinstance(spec.scale, torch.dtype)
    width = x.shape[-1] if spec.group[1] == -1 else spec.group[1]
    x_NC = x.reshape(-1, width)
    scale, zero = choose_scale(
        x_NC, spec.grid, dtype=spec.scale, symmetric=not spec.asymmetric, search="absmax"
    )
    if feedback_H is not None:
        zeros = None if zero is None else zero.expand_as(x_NC).reshape(x.shape)
        codes = _with_feedback(
            x, scale.expand_as(x_NC).reshape(x.shape), zeros, feedback_H, spec.grid
        )
    elif zero is None:
        codes = _codes(x_NC / scale, spec.grid)
    else:
        codes = encode(torch.round(x_NC / scale) + zero, spec.grid)
    zero_point = None if zero is None else encode(zero, spec.grid).view(*x.shape[:-1], -1)
    scale = scale.to(spec.scale).view(*x.shape[:-1], -1)
    return States(_pack(codes.view(x.shape), spec.grid), scale, zero_point)


def _with_feedback(
    x_BHTD: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    feedback_H: Sequence[Feedback],
    grid: Grid,
) -> Tensor:
    """Codes (B, H, T, D); scale and zero point broadcast to ``x``."""
    if len(feedback_H) != x_BHTD.shape[1]:
        raise BadShape(f"feedback for {len(feedback_H)} heads, but there are {x_BHTD.shape[1]}")
    scale = scale.expand_as(x_BHTD)
    out = torch.empty(x_BHTD.shape, dtype=torch.uint8, device=x_BHTD.device)
    width = x_BHTD.shape[-1]
    for head, feedback in enumerate(feedback_H):
        x_NC, scale_NC = (t[:, head].reshape(-1, width) for t in (x_BHTD, scale))
        zero_NC = None if zero is None else zero[:, head].reshape(-1, width)
        codes = feedback_codes(x_NC, scale_NC, zero_NC, feedback, grid)
        out[:, head] = codes.view(out[:, head].shape)
    return out


def dequantize_states(
    states: States, spec: Spec, scale_H: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(grid value - zero point) * scale, computed in float32, as ``dtype``, (B, H, T, D)."""
    x = _values(_unpack(states.codes, spec.grid), spec.grid)
    if states.scale is None:
        assert scale_H is not None
        return x.mul_(scale_H.view(-1, 1, 1)).to(dtype)
    grouped = x.view(*states.scale.shape, -1)
    if states.zero_point is not None:
        grouped -= decode(states.zero_point, spec.grid)[..., None]
    return grouped.mul_(states.scale.float()[..., None]).flatten(-2).to(dtype)


def _codes(x: Tensor, grid: Grid) -> Tensor:
    """`encode`, with the processor's own conversion where that is the same function."""
    if grid == E4M3:
        return x.clamp_(-grid.largest, grid.largest).to(torch.float8_e4m3fn).view(torch.uint8)
    return encode(x, grid)


def _values(codes: Tensor, grid: Grid) -> Tensor:
    """`decode`, likewise."""
    if grid == E4M3:
        return codes.view(torch.float8_e4m3fn).float()
    return decode(codes, grid)


def _pack(codes: Tensor, grid: Grid) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4) if grid.bits == 4 else codes


def _unpack(codes: Tensor, grid: Grid) -> Tensor:
    if grid.bits != 4:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
