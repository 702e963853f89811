"""The compiled column loops against the same arithmetic as tensor operations."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.numerics.columns import solve_batch, solve_batch_by_tensors
from bitwright.numerics.grids import E2M1, E4M3, E5M2, Grid, IntGrid

GRIDS = (*(IntGrid(bits) for bits in range(2, 9)), E4M3, E2M1, E5M2)
ROWS = st.sampled_from([1, 7, 16, 35])  # less, equal and more than the compiled loop takes at once


@given(grid=st.sampled_from(GRIDS), seed=st.integers(0, 2**16), rows=ROWS, width=st.integers(1, 30))
def test_compiled_columns_equal_the_tensor_form(
    grid: Grid, seed: int, rows: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    work = 3 * torch.randn(rows, width, generator=generator, dtype=torch.float64)
    upper = torch.randn(width, width, generator=generator, dtype=torch.float64).triu()
    upper.diagonal().abs_().add_(0.5)
    scale = torch.rand(rows, width, generator=generator, dtype=torch.float64) + 0.1
    zeros = [None]
    if isinstance(grid, IntGrid):
        bound = 1 << grid.bits
        zeros.append(torch.randint(bound, (rows, width), generator=generator).double())
    for zero in zeros:
        before = work.clone()
        plain = solve_batch_by_tensors(work, upper, scale, zero, grid)
        compiled = solve_batch(work, upper, scale, zero, grid)
        assert torch.equal(work, before)
        assert torch.equal(compiled[0], plain[0])
        torch.testing.assert_close(compiled[1], plain[1], rtol=1e-9, atol=1e-9)
