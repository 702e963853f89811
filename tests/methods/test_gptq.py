"""GPTQ against least squares, brute force, and itself under reordering."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import integer_spec, layer, with_hessian
from torch import Tensor

from bitwright.errors import BadShape, NotPositiveDefinite
from bitwright.methods.gptq import gptq
from bitwright.methods.objective import output_error
from bitwright.methods.rtn import choose_scales, rtn
from bitwright.numerics.grids import E2M1, E4M3, IntGrid
from bitwright.numerics.groups import expand
from bitwright.numerics.scales import project
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Spec

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 2**16)
ORDERS = ("activation", "natural")


def _same(a: QuantizedLinear, b: QuantizedLinear) -> bool:
    zeros = (a.zero_point_RG is None) == (b.zero_point_RG is None)
    if zeros and a.zero_point_RG is not None and b.zero_point_RG is not None:
        zeros = torch.equal(a.zero_point_RG, b.zero_point_RG)
    return zeros and torch.equal(a.codes_OI, b.codes_OI) and torch.equal(a.scale_RG, b.scale_RG)


def _error(weight: Tensor, q: QuantizedLinear, hessian: Tensor) -> float:
    return output_error(weight, dequantize(q).to(weight.dtype), hessian)


@given(
    bits=BITS,
    seed=SEEDS,
    asymmetric=st.booleans(),
    size=st.sampled_from([-1, 8, 16]),
    order=st.sampled_from(ORDERS),
    search=st.sampled_from(["mse", "absmax"]),
)
def test_on_a_diagonal_hessian_it_is_round_to_nearest_bit_for_bit(
    bits: int, seed: int, asymmetric: bool, size: int, order: str, search: str
) -> None:
    weight, stats = layer(6, 48, seed)
    diagonal = with_hessian(torch.diag(stats.hessian_II.diagonal()))
    spec = integer_spec(bits, size, asymmetric=asymmetric)
    solved = gptq(weight, diagonal, spec, order=order, search=search)  # type: ignore[arg-type]
    assert _same(solved, rtn(weight, diagonal, spec, search=search))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(
    bits=BITS,
    seed=SEEDS,
    asymmetric=st.booleans(),
    size=st.sampled_from([-1, 8, 16]),
    order=st.sampled_from(ORDERS),
)
def test_codes_do_not_depend_on_the_lazy_width(
    bits: int, seed: int, asymmetric: bool, size: int, order: str
) -> None:
    weight, stats = layer(5, 48, seed)
    spec = integer_spec(bits, size, asymmetric=asymmetric)
    first, *others = (
        gptq(weight, stats, spec, lazy=lazy, order=order)  # type: ignore[arg-type]
        for lazy in (1, 16, 33, 128)
    )
    assert all(_same(first, other) for other in others)


@given(bits=BITS, seed=SEEDS, asymmetric=st.booleans())
def test_permuting_the_columns_permutes_the_codes(bits: int, seed: int, asymmetric: bool) -> None:
    weight, stats = layer(5, 40, seed)
    spec = integer_spec(bits, asymmetric=asymmetric)
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    moved = with_hessian(stats.hessian_II[columns][:, columns])
    # absmax: the mse search sums errors in column order, which can tip a tie between scales
    plain = gptq(weight, stats, spec, search="absmax")
    permuted = gptq(weight[:, columns], moved, spec, search="absmax")
    assert torch.equal(permuted.codes_OI, plain.codes_OI[:, columns])
    assert torch.equal(permuted.scale_RG, plain.scale_RG)


def _least_squares(weight: Tensor, hessian: Tensor, spec: Spec, columns: list[int]) -> Tensor:
    """Fix columns one by one; before each, solve for all free ones afresh."""
    importance = hessian.diagonal()
    scale, zero = choose_scales(weight, spec, search="mse", importance_I=importance)
    shape = (weight.shape[0], weight.shape[1])
    scale = expand(scale, shape, spec.group)
    zero = None if zero is None else expand(zero, shape, spec.group)
    q = weight.clone()
    for step, column in enumerate(columns):
        fixed, free = columns[:step], columns[step:]
        pull = (weight - q)[:, fixed] @ hessian[fixed][:, free]
        target = weight[:, free] + torch.linalg.solve(hessian[free][:, free], pull.T).T
        z = None if zero is None else zero[:, column]
        q[:, column] = project(target[:, 0], scale[:, column], z, spec.grid)
    return q


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "spec",
    [
        *(integer_spec(bits, asymmetric=asym) for bits in (2, 3, 4, 8) for asym in (False, True)),
        Spec(IntGrid(4), (-1, -1), scale=torch.float32),
        Spec(E4M3, (1, -1), scale=torch.float32),
        Spec(E2M1, (1, -1), scale=torch.float32),
    ],
    ids=str,
)
def test_every_step_is_the_least_squares_answer(spec: Spec, order: str) -> None:
    for seed in range(5):
        weight, stats = layer(6, 20, seed)
        hessian = stats.hessian_II
        columns = list(range(20))
        if order == "activation":
            columns = torch.argsort(hessian.diagonal(), descending=True, stable=True).tolist()
        expected = _least_squares(weight, hessian, spec, columns)
        solved = gptq(weight, stats, spec, damp=0.0, order=order)  # type: ignore[arg-type]
        torch.testing.assert_close(
            dequantize(solved, torch.float64), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("size", [-1, 16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_mean_error_is_below_round_to_nearest(bits: int, asymmetric: bool, size: int) -> None:
    spec = integer_spec(bits, size, asymmetric=asymmetric)
    for order in ORDERS:
        ratio = []
        for seed in range(8):
            weight, stats = layer(16, 64, seed, dtype=torch.float32)
            solved = gptq(weight, stats, spec, order=order)  # type: ignore[arg-type]
            nearest = rtn(weight, stats, spec)
            ratio.append(
                _error(weight, solved, stats.hessian_II) / _error(weight, nearest, stats.hessian_II)
            )
        assert sum(ratio) / len(ratio) < 0.9


def test_brute_force_bounds_it_from_below() -> None:
    spec = integer_spec(2)
    every = torch.tensor(list(product(range(-2, 2), repeat=4)), dtype=torch.float64)
    excess_gptq = excess_rtn = 0.0
    for seed in range(60):
        weight, stats = layer(2, 4, seed)
        solved = gptq(weight, stats, spec)
        best = 0.0
        for row, scale in zip(weight, solved.scale_RG.double(), strict=True):
            distance = every * scale - row
            best += float(((distance @ stats.hessian_II) * distance).sum(1).amin())
        nearest = _error(weight, rtn(weight, stats, spec), stats.hessian_II)
        found = _error(weight, solved, stats.hessian_II)
        assert found >= best * (1 - 1e-6)
        assert nearest >= best * (1 - 1e-6)
        excess_gptq += found - best
        excess_rtn += nearest - best
    assert 0 < excess_gptq < excess_rtn


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_dead_columns_become_zero_and_leave_the_others_alone(asymmetric: bool, order: str) -> None:
    weight, stats = layer(5, 24, seed=3)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[0, 7, 23]] = True
    hessian = stats.hessian_II.clone()
    hessian[dead] = 0
    hessian[:, dead] = 0
    spec = integer_spec(4, asymmetric=asymmetric)
    options = {"damp": 0.0, "order": order, "search": "absmax"}
    solved = gptq(weight, with_hessian(hessian), spec, **options)  # type: ignore[arg-type]
    assert dequantize(solved)[:, dead].abs().max() == 0
    alive = ~dead
    rest = gptq(weight[:, alive], with_hessian(hessian[alive][:, alive]), spec, **options)  # type: ignore[arg-type]
    assert torch.equal(solved.codes_OI[:, alive], rest.codes_OI)


def test_a_layer_that_was_never_used_becomes_zero() -> None:
    weight, _ = layer(3, 16, seed=0)
    solved = gptq(weight, with_hessian(torch.zeros(16, 16).double()), integer_spec(4, 8))
    assert dequantize(solved).abs().max() == 0


@pytest.mark.parametrize(
    "hessian",
    [torch.ones(4, 4).double(), torch.ones(4, 4).double() - 0.5 * torch.eye(4).double()],
    ids=["singular", "indefinite"],
)
def test_a_hessian_without_a_factor_raises(hessian: Tensor) -> None:
    with pytest.raises(NotPositiveDefinite):
        gptq(torch.randn(2, 4).double(), with_hessian(hessian), integer_spec(4), damp=0.0)


def test_more_damping_makes_a_singular_hessian_usable() -> None:
    weight = torch.randn(2, 4).double()
    hessian = with_hessian(torch.ones(4, 4).double())
    assert gptq(weight, hessian, integer_spec(4), damp=0.1).shape == (2, 4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [-1, 8])
def test_the_inputs_are_not_modified(size: int, order: str) -> None:
    weight, stats = layer(4, 32, seed=1)
    stats.hessian_II[3] = 0
    stats.hessian_II[:, 3] = 0
    before = (weight.clone(), stats.hessian_II.clone())
    gptq(weight, stats, integer_spec(3, size, asymmetric=True), order=order)  # type: ignore[arg-type]
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.hessian_II, before[1])


def test_shapes_it_cannot_solve_are_refused() -> None:
    weight, stats = layer(4, 32, seed=1)
    with pytest.raises(BadShape, match="2-D blocks"):
        gptq(weight, stats, Spec(IntGrid(4), (2, 8)))
    with pytest.raises(BadShape, match="does not divide"):
        gptq(weight, stats, integer_spec(4, 24))
