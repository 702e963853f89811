"""Nearest-even rounding onto a grid, and back."""

import torch
from torch import Tensor

from bitwright.numerics.grids import FloatGrid, Grid, IntGrid, finite_magnitudes, values

_EXPONENT = 0x7F800000  # these bits of a float32 alone are the power of two below its magnitude


def encode(x: Tensor, grid: Grid) -> Tensor:
    """Codes (uint8, shape of ``x``) of the grid values nearest to ``x``.

    Ties go to the even integer or the even bit pattern; values beyond the grid saturate;
    NaN becomes the NaN code of a FloatGrid that has one. ``x``: float32 or float64.
    """
    if isinstance(grid, IntGrid):
        rounded = torch.round(x).clamp_(grid.lowest, grid.highest)
        return rounded.sub_(grid.lowest).to(torch.uint8)
    return _encode_float(x, grid)


def decode(codes: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """The grid values of ``codes`` (uint8), as ``dtype``."""
    if isinstance(grid, IntGrid):
        return codes.to(dtype).add_(grid.lowest)
    table = values(grid).to(device=codes.device, dtype=dtype)
    return table.index_select(0, codes.flatten().int()).view(codes.shape)  # faster than indexing


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """The grid values nearest to ``x``, as decode(encode(x)), without making codes.

    For values that are finite; ``x``: float32 or float64, which is also the dtype returned.
    """
    if isinstance(grid, IntGrid):
        return torch.round(x).clamp_(grid.lowest, grid.highest)
    bounded = x.clamp(-grid.largest, grid.largest)
    if x.dtype == torch.float32:  # several times as fast as frexp and ldexp
        power = bounded.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
        power = power.clamp_(min=2.0**grid.smallest_exponent)  # the largest power of two below |x|
        # A sum with 1.5 * 2^23 steps keeps whole steps only, rounded to nearest even.
        steps = power.mul_(1.5 * 2.0 ** (23 - grid.mantissa))
        return bounded.add_(steps).sub_(steps)
    _, exponent = torch.frexp(bounded)
    step = (exponent - 1).clamp_(min=grid.smallest_exponent).sub_(grid.mantissa)
    quantum = torch.ldexp(torch.ones_like(bounded), step)
    return (bounded / quantum).round_().mul_(quantum)


def _encode_float(x: Tensor, grid: FloatGrid) -> Tensor:
    levels = finite_magnitudes(grid).to(device=x.device)
    middles = ((levels[1:] + levels[:-1]) / 2).to(x.dtype)
    magnitude = x.abs().nan_to_num(nan=0.0, posinf=torch.finfo(x.dtype).max)
    code = torch.bucketize(magnitude, middles)
    tie = (magnitude == middles[code.clamp(max=middles.numel() - 1)]) & (code < middles.numel())
    code = code + (tie & (code % 2 == 1)).to(code.dtype)
    if grid.specials != "none":
        nan_code = (1 << (grid.exponent + grid.mantissa)) - 1
        code = torch.where(torch.isnan(x), nan_code, code)
    if grid.signed:
        code = code | (torch.signbit(x).to(code.dtype) << (grid.exponent + grid.mantissa))
    return code.to(torch.uint8)
