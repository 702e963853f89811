"""Rounding vectors so that their products with others stay right, rather than their values.

Where only products y . x count, the error to make small is (x - q)ᵀ G (x - q), with G the mean of
y yᵀ. Coordinates are rounded one after the other, and each error is made up for by those still to
come: GPTQ's step (methods/gptq.py) with vectors in place of weight rows.

>>> gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])   # the two coordinates are always read together
>>> x, one = torch.tensor([[0.4, 0.4]]), torch.ones(1, 2)
>>> feedback = feedback_for(gram, torch.ones(2))
>>> (feedback_codes(x, one, None, feedback, IntGrid(8)).int() - 128).tolist()   # nearest: [0, 0]
[[0, 1]]
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.compiled import solve_columns, solve_float_columns
from bitwright.numerics.grids import Grid, IntGrid
from bitwright.numerics.linalg import damped, inverse_cholesky_upper
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import float_parameters

DAMP = 0.01


@dataclass(frozen=True, eq=False)
class Feedback:
    """``order_C``: int64, the coordinates as they are rounded. ``upper_CC``: float32, the upper
    factor of the inverse of G in that order."""

    order_C: Tensor
    upper_CC: Tensor


def feedback_for(gram_CC: Tensor, power_C: Tensor, *, damp: float = DAMP) -> Feedback:
    """Coordinates by falling mean square of both sides, so that small ones make up for large ones.

    ``gram_CC``: float32, mean of y yᵀ; ``power_C``: mean square of x. Where y was always zero
    nothing is passed on. Raises NotPositiveDefinite.
    """
    order = torch.argsort(gram_CC.diagonal() * power_C, descending=True, stable=True)
    if not bool(gram_CC.any()):
        return Feedback(order, torch.eye(len(gram_CC), device=gram_CC.device))
    return Feedback(order, inverse_cholesky_upper(damped(gram_CC, damp)[order[:, None], order]))


def feedback_codes(
    x_NC: Tensor, scale_NC: Tensor, zero_NC: Tensor | None, feedback: Feedback, grid: Grid
) -> Tensor:
    """uint8 codes (N, C) of ``x`` (float32) under given scales and zero points (float32)."""
    order = feedback.order_C
    work_NC, scale_NC = x_NC[:, order], scale_NC[:, order]
    zero_NC = torch.zeros_like(scale_NC) if zero_NC is None else zero_NC[:, order]
    solve = _compiled if x_NC.device.type == "cpu" else _by_tensors
    out = torch.empty(x_NC.shape, dtype=torch.uint8, device=x_NC.device)
    out[:, order] = solve(work_NC, feedback.upper_CC, scale_NC, zero_NC, grid)
    return out


def _compiled(
    work_NC: Tensor, upper_CC: Tensor, scale_NC: Tensor, zero_NC: Tensor, grid: Grid
) -> Tensor:
    work, upper, scale = (t.contiguous().numpy() for t in (work_NC, upper_CC, scale_NC))
    if isinstance(grid, IntGrid):
        zero = zero_NC.contiguous().numpy()
        codes, _ = solve_columns(work, upper, scale, zero, float(grid.lowest), float(grid.highest))
        return torch.from_numpy(codes)
    levels, _ = solve_float_columns(work, upper, scale, *float_parameters(grid))
    return encode(torch.from_numpy(levels), grid)


def _by_tensors(
    work_NC: Tensor, upper_CC: Tensor, scale_NC: Tensor, zero_NC: Tensor, grid: Grid
) -> Tensor:
    work_CN = work_NC.T.contiguous()
    codes = []
    for i, row_N in enumerate(work_CN):
        scale_N, zero_N = scale_NC[:, i], zero_NC[:, i]
        scaled_N = row_N / scale_N
        rounded = torch.round(scaled_N) + zero_N if isinstance(grid, IntGrid) else scaled_N
        codes.append(encode(rounded, grid))
        error_N = (row_N - (decode(codes[-1], grid) - zero_N) * scale_N) / upper_CC[i, i]
        work_CN[i + 1 :] -= upper_CC[i, i + 1 :, None] * error_N
    return torch.stack(codes, 1)
