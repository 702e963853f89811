"""Nearest-even rounding: the golden case, ties, and every 16-bit float against ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.numerics.grids import E2M1, E4M3, E5M2, FloatGrid, Grid, IntGrid, values
from bitwright.numerics.rounding import decode, encode, nearest
from bitwright.numerics.scales import absmax_scale

GOLDEN = torch.tensor([[0.5, -1.2, 3.7, -0.8, 2.1]], dtype=torch.float64)


def test_golden_case() -> None:
    grid = IntGrid(8)
    scale = absmax_scale(GOLDEN, grid)
    assert scale.item() == 3.7 / 127
    integers = decode(encode(GOLDEN / scale, grid), grid)
    assert integers.tolist() == [[17, -41, 127, -27, 72]]


def test_integer_ties_go_to_even() -> None:
    grid = IntGrid(4)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert decode(encode(x, grid), grid).tolist() == [-2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_saturate(bits: int) -> None:
    grid = IntGrid(bits)
    x = torch.tensor([-1e6, 1e6])
    assert decode(encode(x, grid), grid).tolist() == [grid.lowest, grid.highest]


def _all_16_bit(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return every[torch.isfinite(every)]


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("grid", "target", "overflow"),
    [
        (E4M3, ml_dtypes.float8_e4m3fn, 464.1),  # 464, a tie, still goes to 448
        (E5M2, ml_dtypes.float8_e5m2, 61440.0),  # this tie goes to infinity
        (E2M1, ml_dtypes.float4_e2m1fn, torch.inf),  # saturates as we do
    ],
    ids=["E4M3", "E5M2", "E2M1"],
)
def test_every_16_bit_float_rounds_as_in_ml_dtypes(
    grid: FloatGrid, target: type, overflow: float, source: torch.dtype
) -> None:
    """Bit for bit, up to where ml_dtypes leaves the finite values and we saturate."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(source).float()
    with np.errstate(all="ignore"):
        expected = x.numpy().astype(target).view(np.uint8)
    codes = encode(x, grid)
    fits = x.abs() < overflow
    assert int(fits.sum()) > 10_000
    np.testing.assert_array_equal(codes.numpy()[fits], expected[fits])
    back = decode(codes, grid)
    beyond = x.abs() >= overflow
    assert torch.equal(back[beyond], torch.sign(x[beyond]) * grid.largest)
    if grid.specials != "none":
        assert torch.equal(torch.isnan(back), torch.isnan(x))
        assert np.isnan(codes.numpy().view(target).astype(np.float32))[torch.isnan(x)].all()


@pytest.mark.parametrize("grid", [E4M3, E5M2, E2M1])
def test_floats_saturate_and_keep_the_sign(grid: FloatGrid) -> None:
    beyond = torch.tensor([1.0, -1.0]) * grid.largest * 4
    infinite = torch.tensor([torch.inf, -torch.inf])
    for x in (beyond, infinite):
        assert decode(encode(x, grid), grid).tolist() == [grid.largest, -grid.largest]
    assert torch.signbit(decode(encode(torch.tensor([-0.0]), grid), grid)).item()


@pytest.mark.parametrize("grid", [E4M3, E5M2])
def test_nan_stays_nan(grid: FloatGrid) -> None:
    x = torch.tensor([torch.nan, 1.0])
    back = decode(encode(x, grid), grid)
    assert torch.isnan(back).tolist() == [True, False]


@given(
    st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=40),
    st.sampled_from([IntGrid(3), IntGrid(8), IntGrid(5, signed=False), E4M3, E5M2, E2M1]),
)
def test_no_grid_value_is_nearer(numbers: list[float], grid: IntGrid | FloatGrid) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)
    table = values(grid)
    table = table[torch.isfinite(table)]
    distance = (decode(encode(x, grid), grid, torch.float64) - x).abs()
    assert torch.equal(distance, (x[:, None] - table).abs().amin(1))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [E4M3, E5M2, E2M1, IntGrid(8), IntGrid(3)], ids=str)
def test_nearest_is_encode_then_decode(grid: Grid, source: torch.dtype) -> None:
    x = _all_16_bit(source).float()
    assert torch.equal(nearest(x, grid), decode(encode(x, grid), grid))
