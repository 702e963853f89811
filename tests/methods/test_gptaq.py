"""GPTAQ's target: the least-squares fit to the original model's outputs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.problems import integer_spec

from bitwright.errors import NotPositiveDefinite
from bitwright.methods.gptaq import retarget
from bitwright.methods.gptq import gptq
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.stats import InputStats


def problem(seed: int, inputs: int, noise: float = 0.3) -> tuple[torch.Tensor, ...]:
    """(weight, true inputs, inputs behind rounded layers, hessian, drift) in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    true = torch.randn(8 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixed
    shift = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs
    behind = true + noise * true @ shift
    weight = torch.randn(5, inputs, generator=generator, dtype=torch.float64)
    tokens = len(true)
    return weight, true, behind, behind.T @ behind / tokens, (true - behind).T @ behind / tokens


@given(seed=st.integers(0, 10_000), inputs=st.integers(1, 24))
def test_full_strength_is_the_least_squares_fit(seed: int, inputs: int) -> None:
    weight, true, behind, hessian, drift = problem(seed, inputs)
    fit = torch.linalg.lstsq(behind, true @ weight.T).solution.T
    found = retarget(weight, hessian, drift, strength=1.0, damp=0.0)
    expected, got = behind @ fit.T, behind @ found.T
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@given(seed=st.integers(0, 10_000), strength=st.floats(0, 1))
def test_strength_moves_linearly_and_inputs_stay(seed: int, strength: float) -> None:
    weight, _, _, hessian, drift = problem(seed, 9)
    copies = [weight.clone(), hessian.clone(), drift.clone()]
    full = retarget(weight, hessian, drift, strength=1.0)
    part = retarget(weight, hessian, drift, strength=strength)
    torch.testing.assert_close(part, weight + strength * (full - weight))
    for before, after in zip(copies, (weight, hessian, drift), strict=True):
        assert torch.equal(before, after)


def test_without_drift_nothing_moves() -> None:
    weight, _, _, hessian, drift = problem(0, 9)
    assert torch.equal(retarget(weight, hessian, torch.zeros_like(drift), strength=1.0), weight)


def test_codes_for_the_new_target_put_out_more_of_what_the_original_did() -> None:
    better = 0
    for seed in range(20):
        weight, true, behind, hessian, drift = (t.float() for t in problem(seed, 32))
        stats = InputStats(hessian, behind.abs().mean(0), behind.abs().amax(0), len(behind))
        spec = integer_spec(4, 16)
        aimed = gptq(retarget(weight, hessian, drift, strength=1.0), stats, spec)
        plain = gptq(weight, stats, spec)
        errors = [
            (behind @ dequantize(q).T - true @ weight.T).square().mean() for q in (aimed, plain)
        ]
        better += bool(errors[0] < errors[1])
    assert better == 20


def test_a_hessian_without_a_factor_raises() -> None:
    with pytest.raises(NotPositiveDefinite):
        retarget(torch.ones(1, 2), -torch.eye(2), torch.eye(2), strength=1.0)
