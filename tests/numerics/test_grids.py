"""Every code of every grid, against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from bitwright.numerics.grids import (
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    FloatGrid,
    IntGrid,
    finite_magnitudes,
    values,
)
from bitwright.numerics.rounding import decode, encode

FLOATS = {
    "E4M3": (E4M3, ml_dtypes.float8_e4m3fn),
    "E5M2": (E5M2, ml_dtypes.float8_e5m2),
    "E2M1": (E2M1, ml_dtypes.float4_e2m1fn),
    "E8M0": (E8M0, ml_dtypes.float8_e8m0fnu),
}
INTEGERS = [IntGrid(bits, signed) for bits in range(2, 9) for signed in (True, False)]


@pytest.mark.parametrize(("grid", "dtype"), FLOATS.values(), ids=FLOATS.keys())
def test_float_values_are_those_of_ml_dtypes(grid: FloatGrid, dtype: type) -> None:
    codes = np.arange(1 << grid.bits, dtype=np.uint8)
    expected = codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(values(grid).numpy(), expected)
    signs = np.signbit(expected[~np.isnan(expected)])
    np.testing.assert_array_equal(np.signbit(values(grid).numpy()[~np.isnan(expected)]), signs)


@pytest.mark.parametrize(
    ("grid", "bits", "largest"),
    [(E4M3, 8, 448.0), (E5M2, 8, 57344.0), (E2M1, 4, 6.0), (E8M0, 8, 2.0**127)],
)
def test_float_grids_have_the_published_range(grid: FloatGrid, bits: int, largest: float) -> None:
    assert (grid.bits, grid.largest) == (bits, largest)


@pytest.mark.parametrize("grid", INTEGERS, ids=str)
def test_integer_grids_hold_consecutive_integers(grid: IntGrid) -> None:
    assert grid.highest - grid.lowest == 2**grid.bits - 1
    assert grid.lowest == (-(2 ** (grid.bits - 1)) if grid.signed else 0)
    assert values(grid).tolist() == list(range(grid.lowest, grid.highest + 1))
    assert grid.largest == grid.highest


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_integer_grids_of_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="2 to 8 bits"):
        IntGrid(bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [*INTEGERS, E4M3, E5M2, E2M1, E8M0], ids=str)
def test_every_finite_code_round_trips(grid: IntGrid | FloatGrid, dtype: torch.dtype) -> None:
    codes = torch.arange(1 << grid.bits, dtype=torch.uint8)
    codes = codes[torch.isfinite(values(grid))]
    value = decode(codes, grid, dtype)
    assert value.dtype is dtype
    assert torch.equal(value.double(), values(grid)[codes.long()])
    assert torch.equal(encode(value, grid), codes)


def test_magnitudes_ascend_with_their_codes() -> None:
    for grid in (E4M3, E5M2, E2M1, E8M0):
        assert bool((finite_magnitudes(grid).diff() > 0).all())
