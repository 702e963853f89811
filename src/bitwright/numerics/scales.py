"""Choosing scale and zero point for groups of values, at the precision they are stored in.

A value x is stored as the grid code nearest to x / scale + zero, and read back as
(grid value - zero) * scale. All choices are made with the *stored* (rounded) scale, so
what is measured here is what a runtime computes.
"""

from typing import Literal

import torch
from torch import Tensor

from bitwright.numerics.compiled import best_candidate, best_float_candidate, round_trip
from bitwright.numerics.grids import E4M3, E8M0, FloatGrid, Grid, IntGrid
from bitwright.numerics.rounding import decode, encode, nearest

Search = Literal["absmax", "mse"]

CANDIDATES = 64
SMALLEST_RATIO = 0.45
GROUPS_AT_ONCE = 1 << 14  # their candidates stay in the cache
VALUES_AT_ONCE = 1 << 21
MORE_ELSEWHERE = 1 << 5  # a GPU wants few large steps


Storage = torch.dtype | Grid


def storage_dtype(storage: Storage) -> torch.dtype:
    """The torch dtype that holds scales of a dtype, or of the grid E4M3 (NVFP4) or E8M0 (MX)."""
    if isinstance(storage, torch.dtype):
        return storage
    return torch.float8_e4m3fn if storage == E4M3 else torch.float8_e8m0fnu


def store_scale(scale: Tensor, storage: Storage) -> Tensor:
    """``scale`` rounded to ``storage`` and back; a scale that would vanish becomes one.

    Powers of two (E8M0) are rounded up, so that what absmax scaling covers stays covered.
    """
    if storage == E8M0:
        exponent = torch.ceil(torch.log2(scale.abs())).clamp(-127, 127)
        stored = torch.ldexp(torch.ones_like(scale), exponent.int())
        stored = torch.where(scale == 0, torch.zeros_like(scale), stored)
    elif isinstance(storage, torch.dtype):
        stored = scale.to(storage).to(scale.dtype)
    else:
        stored = nearest(scale, storage)
    usable = torch.isfinite(stored) & (stored.abs() > torch.finfo(torch.float32).tiny)
    return torch.where(usable, stored, torch.ones_like(stored))


def absmax_scale(x_NC: Tensor, grid: Grid) -> Tensor:
    """Symmetric scale max|x| / largest grid value, shape (N, 1)."""
    return x_NC.abs().amax(-1, keepdim=True) / grid.largest


def minmax_scale(x_NC: Tensor, grid: IntGrid, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Asymmetric (scale, zero), each (N, 1), covering ratio * [min(x, 0), max(x, 0)]."""
    low = x_NC.amin(-1, keepdim=True).clamp(max=0) * ratio
    high = x_NC.amax(-1, keepdim=True).clamp(min=0) * ratio
    scale = (high - low) / (grid.highest - grid.lowest)
    return scale, low


def zero_point(low: Tensor, scale: Tensor, grid: IntGrid) -> Tensor:
    """The integer that ``low`` is shifted by so that it lands on the grid's lowest value."""
    return (grid.lowest - torch.round(low / scale)).clamp(grid.lowest, grid.highest)


def choose_scale(
    x_NC: Tensor,
    grid: Grid,
    *,
    dtype: Storage,
    symmetric: bool = True,
    search: Search = "mse",
    importance_RC: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero) for N groups of C values: scale (N, 1), zero (N, 1) or None if symmetric.

    "absmax" covers every value (min and max if asymmetric). "mse" tries CANDIDATES narrower
    and wider grids, of either sign if symmetric (the two's-complement range reaches one step
    further on one side), and keeps the one of least squared error weighted by ``importance``
    (R, C) with group n using row n % R; then refits the scale to the codes by least squares.
    """
    if search == "absmax":
        if symmetric:
            return store_scale(absmax_scale(x_NC, grid), dtype), None
        assert isinstance(grid, IntGrid)
        raw, low = minmax_scale(x_NC, grid)
        scale = store_scale(raw, dtype)
        return scale, zero_point(low, scale, grid)
    if importance_RC is None:
        importance_RC = torch.ones_like(x_NC[:1])
    rows = len(importance_RC)
    at_once = min(GROUPS_AT_ONCE, VALUES_AT_ONCE // x_NC.shape[1])
    if x_NC.device.type != "cpu":
        at_once *= MORE_ELSEWHERE
    at_once = max(1, -(-at_once // rows)) * rows
    if len(x_NC) > at_once:  # groups are independent, and candidates take more than the values
        parts = [
            choose_scale(
                x_NC[start : start + at_once], grid, dtype=dtype, symmetric=symmetric,
                search=search, importance_RC=importance_RC,
            )
            for start in range(0, len(x_NC), at_once)
        ]  # fmt: skip
        zeros = [zero for _, zero in parts if zero is not None]
        return torch.cat([scale for scale, _ in parts]), torch.cat(zeros) if zeros else None
    scale_NK, zero_NK = _candidates(x_NC, grid, dtype, symmetric)
    scale, zero = _least_error(x_NC, importance_RC, scale_NK, zero_NK, grid)
    refit = _refit(x_NC, importance_RC, scale, zero, grid, dtype)
    scale_NK = torch.cat([scale, refit], 1)
    scale, zero = _least_error(x_NC, importance_RC, scale_NK, zero.expand(-1, 2), grid)
    return scale, None if symmetric else zero


def _candidates(x_NC: Tensor, grid: Grid, dtype: Storage, symmetric: bool) -> tuple[Tensor, Tensor]:
    ratio_K = torch.linspace(1.0, SMALLEST_RATIO, CANDIDATES, dtype=x_NC.dtype, device=x_NC.device)
    if symmetric:
        scale_NK = store_scale(absmax_scale(x_NC, grid) * ratio_K, dtype)
        if isinstance(grid, IntGrid):
            scale_NK = torch.cat([scale_NK, -scale_NK], 1)
        return scale_NK, torch.zeros_like(scale_NK)
    assert isinstance(grid, IntGrid)
    raw, low = minmax_scale(x_NC, grid)
    scale_NK = store_scale(raw * ratio_K, dtype)
    return scale_NK, zero_point(low * ratio_K, scale_NK, grid)


def _least_error(
    x_NC: Tensor, weight_RC: Tensor, scale_NK: Tensor, zero_NK: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    if isinstance(grid, IntGrid) and x_NC.device.type == "cpu":
        best_N = torch.from_numpy(
            best_candidate(
                x_NC.contiguous().numpy(),
                weight_RC.to(x_NC.dtype).contiguous().numpy(),
                scale_NK.contiguous().numpy(),
                zero_NK.contiguous().numpy(),
                float(grid.lowest),
                float(grid.highest),
            )
        )
    elif isinstance(grid, FloatGrid) and x_NC.device.type == "cpu":
        best_N = torch.from_numpy(
            best_float_candidate(
                x_NC.contiguous().numpy(),
                weight_RC.to(x_NC.dtype).contiguous().numpy(),
                scale_NK.contiguous().numpy(),
                *float_parameters(grid),
            )
        )
    else:
        best_N = _least_error_by_tensors(x_NC, weight_RC, scale_NK, zero_NK, grid)
    pick = best_N[:, None]
    return scale_NK.gather(1, pick), zero_NK.gather(1, pick)


def float_parameters(grid: FloatGrid) -> tuple[int, int, float]:
    """What the compiled loops need to know of a grid."""
    return grid.mantissa, grid.smallest_exponent, grid.largest


def _least_error_by_tensors(
    x_NC: Tensor, weight_RC: Tensor, scale_NK: Tensor, zero_NK: Tensor, grid: Grid
) -> Tensor:
    weight_NC = weight_RC.repeat(x_NC.shape[0] // weight_RC.shape[0], 1)
    errors = []
    for k in range(scale_NK.shape[1]):
        scale, zero = scale_NK[:, k : k + 1], zero_NK[:, k : k + 1]
        error = project(x_NC, scale, zero, grid).sub_(x_NC)
        errors.append((weight_NC * error * error).sum(-1))
    return torch.stack(errors, 1).argmin(1)


def project(x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """``x`` rounded to the grid and read back; ``scale`` and ``zero`` broadcast to ``x``."""
    if isinstance(grid, IntGrid) and x.device.type == "cpu" and scale.shape == (len(x), 1):
        zeros = torch.zeros_like(scale) if zero is None else zero
        done = round_trip(
            x.contiguous().numpy(),
            scale.contiguous().numpy(),
            zeros.to(x.dtype).contiguous().numpy(),
            float(grid.lowest),
            float(grid.highest),
        )
        return torch.from_numpy(done)
    if zero is None or not isinstance(grid, IntGrid):
        return nearest(x / scale, grid).mul_(scale)
    codes = encode(torch.round(x / scale) + zero, grid)
    return (decode(codes, grid, x.dtype) - zero) * scale


def _refit(
    x_NC: Tensor, weight_RC: Tensor, scale: Tensor, zero: Tensor, grid: Grid, dtype: Storage
) -> Tensor:
    level_NC = project(x_NC, scale, zero, grid) / scale
    weight_NC = weight_RC.to(x_NC.dtype).repeat(x_NC.shape[0] // weight_RC.shape[0], 1)
    weighted = weight_NC * level_NC
    power = (weighted * level_NC).sum(-1, keepdim=True)
    refit = (weighted * x_NC).sum(-1, keepdim=True) / power
    return torch.where(power > 0, store_scale(refit, dtype), scale)
