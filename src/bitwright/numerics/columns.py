"""GPTQ's sequential step: the columns of one batch, each rounded in turn.

Compiled for the CPU (`compiled.py`); on other devices the same arithmetic as tensor operations.
"""

import torch
from torch import Tensor

from bitwright.numerics.compiled import solve_columns, solve_float_columns
from bitwright.numerics.grids import Grid, IntGrid
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import float_parameters


def solve_batch(
    work_OB: Tensor, upper_BB: Tensor, scale_OB: Tensor, zero_OB: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor]:
    """(codes uint8, errors), both (O, B); the arguments are left as they are.

    Column i is rounded under its scale and zero point, its error divided by upper[i, i], and every
    later column of the batch loses error * upper[i, j]. Floats are of one dtype.
    """
    if work_OB.device.type != "cpu":
        return solve_batch_by_tensors(work_OB, upper_BB, scale_OB, zero_OB, grid)
    work, upper, scale = (t.contiguous().numpy() for t in (work_OB, upper_BB, scale_OB))
    if not isinstance(grid, IntGrid):
        parameters = float_parameters(grid)
        levels, errors = solve_float_columns(work, upper, scale, *parameters)
        return encode(torch.from_numpy(levels), grid), torch.from_numpy(errors)
    zero = (torch.zeros_like(work_OB) if zero_OB is None else zero_OB).contiguous().numpy()
    bounds = float(grid.lowest), float(grid.highest)
    codes, errors = solve_columns(work, upper, scale, zero, *bounds)
    return torch.from_numpy(codes), torch.from_numpy(errors)


def solve_batch_by_tensors(
    work_OB: Tensor, upper_BB: Tensor, scale_OB: Tensor, zero_OB: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor]:
    """`solve_batch` for any device."""
    work_OB = work_OB.clone()
    codes_OB = torch.empty_like(work_OB, dtype=torch.uint8)
    for i in range(work_OB.shape[1]):
        column = slice(i, i + 1)
        scaled = work_OB[:, column] / scale_OB[:, column]
        zero = 0 if zero_OB is None else zero_OB[:, column]
        codes = encode(scaled if zero_OB is None else scaled.round() + zero, grid)
        error = (
            work_OB[:, column] - (decode(codes, grid, work_OB.dtype) - zero) * scale_OB[:, column]
        )
        error = error / upper_BB[i, i]
        codes_OB[:, column] = codes
        work_OB[:, i + 1 :] -= error * upper_BB[column, i + 1 :]
        work_OB[:, column] = error  # its place is not needed any more
    return codes_OB, work_OB
