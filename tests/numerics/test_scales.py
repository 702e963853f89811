"""Scale choice: formulas, storage precision, and the search never losing to absmax."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.numerics.compiled import best_candidate, best_float_candidate
from bitwright.numerics.grids import E2M1, E4M3, E8M0, FloatGrid, Grid, IntGrid
from bitwright.numerics.scales import (
    Search,
    Storage,
    _candidates,
    _least_error_by_tensors,
    choose_scale,
    float_parameters,
    minmax_scale,
    project,
    storage_dtype,
    store_scale,
    zero_point,
)


def _error(x_NC: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, weight: Tensor) -> Tensor:
    difference = project(x_NC.double(), scale.double(), zero, grid) - x_NC.double()
    return (weight.double() * difference**2).sum(-1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_symmetric_absmax_is_the_formula(bits: int) -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    scale, zero = choose_scale(x, IntGrid(bits), dtype=torch.float64, search="absmax")
    assert zero is None
    assert torch.equal(scale[:, 0], x.abs().amax(1) / (2 ** (bits - 1) - 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_asymmetric_covers_minimum_maximum_and_zero(bits: int) -> None:
    grid = IntGrid(bits, signed=False)
    x = torch.rand(6, 32, dtype=torch.float64) * 3 - 1
    x[0] = x[0].abs() + 5  # no negative value: zero must still be a code
    scale, zero = choose_scale(x, grid, dtype=torch.float64, symmetric=False, search="absmax")
    assert zero is not None
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    torch.testing.assert_close(scale[:, 0], (high - low) / (2**bits - 1))
    assert torch.equal(zero, torch.round(zero))
    assert bool(((zero >= 0) & (zero < 2**bits)).all())
    assert project(torch.zeros(6, 1).double(), scale, zero, grid).abs().max() == 0
    assert bool(((project(x, scale, zero, grid) - x).abs() <= scale).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_are_returned_at_storage_precision(dtype: torch.dtype) -> None:
    x = torch.randn(8, 32)
    for search in ("absmax", "mse"):
        scale, _ = choose_scale(x, IntGrid(4), dtype=dtype, search=search)
        assert torch.equal(scale, scale.to(dtype).to(scale.dtype))


def test_a_vanishing_scale_becomes_one() -> None:
    assert store_scale(torch.tensor([0.0, 1e-12, 2.0]), torch.float16).tolist() == [1.0, 1.0, 2.0]
    for search in ("absmax", "mse"):
        for symmetric in (True, False):
            grid = IntGrid(4, signed=symmetric)
            scale, zero = choose_scale(
                torch.zeros(2, 8), grid, dtype=torch.bfloat16, symmetric=symmetric, search=search
            )
            assert project(torch.zeros(2, 8), scale, zero, grid).tolist() == [[0.0] * 8] * 2


@given(
    seed=st.integers(0, 2**20),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    weighted=st.booleans(),
)
def test_search_never_loses_to_absmax(
    seed: int, bits: int, symmetric: bool, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 32, generator=generator, dtype=torch.float64)
    x *= torch.rand(12, 1, generator=generator, dtype=torch.float64) * 4
    weight = torch.rand(3, 32, generator=generator, dtype=torch.float64) if weighted else None
    grid = IntGrid(bits, signed=symmetric)
    every = torch.ones(12, 32) if weight is None else weight.repeat(4, 1)
    errors = {}
    for search in ("absmax", "mse"):
        scale, zero = choose_scale(
            x,
            grid,
            dtype=torch.bfloat16,
            symmetric=symmetric,
            search=search,
            importance_RC=weight if search == "mse" else None,
        )
        errors[search] = _error(x, scale, zero, grid, every)
    assert bool((errors["mse"] <= errors["absmax"] * (1 + 1e-9)).all())
    if bits <= 4:
        assert errors["mse"].sum() < errors["absmax"].sum()


@pytest.mark.parametrize("grid", [E4M3, E2M1])
def test_search_on_float_grids_never_loses_to_absmax(grid: Grid) -> None:
    x = torch.randn(20, 32)
    ones = torch.ones(20, 32)
    plain, _ = choose_scale(x, grid, dtype=torch.float32, search="absmax")
    best, _ = choose_scale(x, grid, dtype=torch.float32, search="mse")
    least = _error(x, best, None, grid, ones)
    assert bool((least <= _error(x, plain, None, grid, ones) * (1 + 1e-5)).all())
    assert least.sum() < _error(x, plain, None, grid, ones).sum()


@given(
    seed=st.integers(0, 2**20),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_compiled_search_equals_the_tensor_form(
    seed: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 24, generator=generator, dtype=dtype)
    weight = torch.rand(4, 24, generator=generator, dtype=dtype) + 0.1
    grid = IntGrid(bits, signed=symmetric)
    scale, zero = _candidates(x, grid, torch.float32, symmetric)
    compiled = torch.from_numpy(
        best_candidate(
            x.numpy(),
            weight.numpy(),
            scale.numpy(),
            zero.numpy(),
            float(grid.lowest),
            float(grid.highest),
        )
    )
    plain = _least_error_by_tensors(x, weight, scale, zero, grid)
    picked = [
        _error(
            x, scale.gather(1, k[:, None]), zero.gather(1, k[:, None]), grid, weight.repeat(3, 1)
        )
        for k in (compiled, plain)
    ]
    # x * (1 / s) and x / s differ in the last bit, so a tie may fall to the other candidate.
    tolerance = 1e-12 if dtype is torch.float64 else 1e-5
    torch.testing.assert_close(picked[0], picked[1], rtol=tolerance, atol=0)


def test_minmax_ratio_narrows_both_ends() -> None:
    x = torch.tensor([[-2.0, 6.0]], dtype=torch.float64)
    grid = IntGrid(4, signed=False)
    scale, low = minmax_scale(x, grid, ratio=0.5)
    assert (scale.item(), low.item()) == (4 / 15, -1.0)
    assert zero_point(low, scale, grid).item() == 4.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_least_squares_refit_is_kept_only_where_it_helps(bits: int, symmetric: bool) -> None:
    grid = IntGrid(bits, signed=symmetric)
    x = torch.randn(400, 16, dtype=torch.float64)
    ones = torch.ones(400, 16)
    scale, zero = _candidates(x, grid, torch.bfloat16, symmetric)
    best = _least_error_by_tensors(x, ones[:1], scale, zero, grid)[:, None]
    without = _error(x, scale.gather(1, best), zero.gather(1, best), grid, ones)
    chosen = choose_scale(x, grid, dtype=torch.bfloat16, symmetric=symmetric)
    errors = _error(x, *chosen, grid, ones)
    assert bool((errors <= without * (1 + 1e-9)).all())
    assert errors.sum() < without.sum()


@given(seed=st.integers(0, 2**20), grid=st.sampled_from([E4M3, E2M1]))
def test_compiled_float_search_equals_the_tensor_form(seed: int, grid: FloatGrid) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 24, generator=generator, dtype=torch.float64)
    weight = torch.rand(4, 24, generator=generator, dtype=torch.float64) + 0.1
    scale, zero = _candidates(x, grid, torch.float32, True)
    compiled = best_float_candidate(
        x.numpy(), weight.numpy(), scale.numpy(), *float_parameters(grid)
    )
    plain = _least_error_by_tensors(x, weight, scale, zero, grid)
    assert torch.equal(torch.from_numpy(compiled), plain)


@given(st.floats(1e-30, 1e30))
def test_powers_of_two_are_rounded_up(scale: float) -> None:
    stored = float(store_scale(torch.tensor([scale], dtype=torch.float64), E8M0))
    assert scale <= stored < 2 * scale
    assert torch.frexp(torch.tensor(stored)).mantissa == 0.5


@pytest.mark.parametrize("storage", [E4M3, E8M0, torch.bfloat16], ids=str)
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_scales_survive_their_storage(storage: Storage, search: Search) -> None:
    x = torch.randn(40, 16) * torch.logspace(-1, 1, 40)[:, None]
    scale, _ = choose_scale(x, E2M1, dtype=storage, search=search)
    assert torch.equal(scale.to(storage_dtype(storage)).float(), scale)


def test_absmax_scaling_by_powers_of_two_clips_nothing() -> None:
    x = torch.randn(200, 32)
    scale, _ = choose_scale(x, E2M1, dtype=E8M0, search="absmax")
    assert bool((x.abs() <= 6 * scale).all())
