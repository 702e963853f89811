"""Gradients behind parameters, against finite differences of what they are estimates of."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import expand, split
from bitwright.numerics.rounding import decode
from bitwright.schemes.inputs import straight_through_input
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Spec, parse_scheme
from bitwright.training.cache import straight_through_states
from bitwright.training.latent import MinMax, Plain, Scaled, Stepped

SCHEMES = ("W2A16", "W4A16", "W8A16", "W8A8-FP8", "NVFP4A16", "MXFP4", "MXFP8")
EPSILON = 1e-3


def weight_of(seed: int, rows: int = 6, cols: int = 64) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def spec_of(bits: int, *, asymmetric: bool = False) -> Spec:
    """Groups of 32 with scales in float32, so that storage does not hide differences."""
    scheme = parse_scheme(f"W{bits}A16").with_weight(group_size=32, asymmetric=asymmetric)
    return scheme.with_scales(torch.float32).weight


def slope(function, at: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """Central differences of a scalar function, one entry at a time."""
    out = torch.empty_like(at)
    for index in range(at.numel()):
        step = torch.zeros_like(at)
        step.view(-1)[index] = EPSILON
        out.view(-1)[index] = (function(at + step) - function(at - step)) / (2 * EPSILON)
    return out


def sign_of(q: QuantizedLinear) -> Tensor:
    """Searched scales of symmetric grids may be negative."""
    return torch.where(q.scale_RG.float() < 0, -1.0, 1.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_the_dequantized_layer(scheme: str) -> None:
    spec = parse_scheme(scheme).weight
    weight = weight_of(0, cols=128)
    q = rtn(weight, None, spec)
    for latent in (MinMax(weight, q), Scaled(q), Scaled(q, codes=True), Stepped(weight, q)):
        assert torch.equal(latent.value(), dequantize(latent.result()))
    for exponent in range(-40, 11, 2):  # none is changed by being learned
        q = rtn(weight * 2.0**exponent, None, spec)
        for codes in (False, True):
            again = Scaled(q, codes=codes).result()
            assert torch.equal(decode(again.codes_OI, spec.grid), decode(q.codes_OI, spec.grid))
            assert torch.equal(again.scale_RG.float(), q.scale_RG.float())


@given(seed=st.integers(0, 1000), scheme=st.sampled_from(SCHEMES), asymmetric=st.booleans())
def test_fixed_codes_have_exact_gradients(seed: int, scheme: str, asymmetric: bool) -> None:
    weight, towards = weight_of(seed), weight_of(seed + 1)
    spec = parse_scheme(scheme).weight
    if isinstance(spec.grid, IntGrid):
        spec = spec_of(spec.grid.bits, asymmetric=asymmetric)
    latent = Scaled(rtn(weight, None, spec))
    whole = 1.0 if latent.original.global_scale is None else float(latent.original.global_scale)
    latent.take(towards)

    def loss(name: str, value: Tensor) -> Tensor:
        q = latent.original
        scale = sign_of(q) * (value if name == "scale" else latent.leaves["scale"]).exp() * whole
        level = decode(q.codes_OI, q.spec.grid)
        if q.zero_point_RG is not None:
            zero = value if name == "zero" else latent.leaves["zero"]
            level = level - expand(zero, q.shape, q.spec.group)
        return (level * expand(scale, q.shape, q.spec.group) * towards).double().sum()

    for name, leaf in latent.leaves.items():
        found = slope(lambda value, name=name: loss(name, value), leaf)
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, found, atol=2e-2, rtol=1e-2)


@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), asymmetric=st.booleans())
def test_positions_follow_the_estimator(seed: int, bits: int, asymmetric: bool) -> None:
    """Rounding counts as adding a constant: with it held, the differences are ordinary ones."""
    towards = weight_of(seed + 1)
    start = rtn(weight_of(seed), None, spec_of(bits, asymmetric=asymmetric))
    latent = Scaled(start, codes=True)
    moved = latent.leaves["code"] + 1.3 * weight_of(seed + 2)  # some leave the grid
    latent.leaves["code"].copy_(moved)
    q = latent.result()
    level = decode(q.codes_OI, q.spec.grid)
    offset = level - moved
    clamped = offset.abs() > 0.5
    latent.take(towards)
    scale_OI = expand(sign_of(q) * latent.leaves["scale"].exp(), q.shape, q.spec.group)

    def loss(position: Tensor) -> Tensor:
        surrogate = torch.where(clamped, level, position + offset)
        return (surrogate * scale_OI * towards).double().sum()

    found, grad = slope(loss, moved), latent.leaves["code"].grad
    assert grad is not None
    assert torch.allclose(grad, found, atol=2e-2, rtol=1e-2)
    assert bool((grad[clamped] == 0).all())
    assert bool(clamped.any()) or bits > 4


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    scheme=st.sampled_from(("W2A16", "W3A16", "W4A16", "W8A8-FP8", "NVFP4A16")),
    asymmetric=st.booleans(),
)
def test_learned_steps_have_the_gradients_of_the_paper(
    seed: int, scheme: str, asymmetric: bool
) -> None:
    """Esser et al. 2020, equations 1 to 5, written out, and finite differences of the rounded
    weight with what rounding adds held constant."""
    spec = parse_scheme(scheme).weight
    if isinstance(spec.grid, IntGrid):
        spec = spec_of(int(scheme[1]), asymmetric=asymmetric)
    elif not spec.two_level:
        spec = replace(spec, scale=torch.float32)
    weight, towards = weight_of(seed), weight_of(seed + 1)
    start = rtn(weight, None, spec)
    shrunk = replace(start, scale_RG=(start.scale_RG.float() * 0.7).to(start.scale_RG.dtype))
    latent = Stepped(weight, shrunk)  # some weights lie beyond the grid
    latent.take(towards)
    q = latent.result()
    grid, group = spec.grid, spec.group
    whole = 1.0 if q.global_scale is None else float(q.global_scale)
    low = grid.lowest if isinstance(grid, IntGrid) else -grid.largest
    level = decode(q.codes_OI, grid)
    zero_RG = torch.zeros_like(q.scale_RG.float())
    if q.zero_point_RG is not None:
        zero_RG = q.zero_point_RG.float()
    zero = expand(zero_RG, q.shape, group)
    scale = expand(q.scale_RG.float() * whole, q.shape, group)
    v = weight / scale
    beyond = (v + zero <= low) | (v + zero >= grid.largest)
    assert bool(beyond.any())

    by_scale = torch.where(beyond, level - zero, level - zero - v)  # equation 3, (..)
    per_scale = split(by_scale * towards, group)
    g = 1 / (per_scale.shape[-1] * grid.largest) ** 0.5  # section 2.2
    paper = per_scale.sum(-1) * g * q.scale_RG.float() * whole  # of the logarithm
    found = latent.leaves["scale"].grad
    assert found is not None
    assert torch.allclose(found, paper, rtol=1e-4, atol=1e-5)

    added = torch.where(beyond, 0.0, level - zero - v)  # by rounding

    def loss(name: str, value: Tensor) -> Tensor:
        w, s, z = weight, scale, zero
        if name == "code":
            w = value * expand(unit_RG, q.shape, group)
        elif name == "scale":
            s = expand(sign_of(q) * value.exp() * whole, q.shape, group)
        else:
            z = expand(value, q.shape, group)
        inside = s * (w / s + added)
        return (torch.where(beyond, s * (level - z), inside) * towards).double().sum()

    unit_RG = shrunk.scale_RG.float().abs() * whole
    held = {"code": latent.leaves["code"], "scale": q.scale_RG.float().abs().log()}
    if "zero" in latent.leaves:
        held["zero"] = zero_RG
    for name, value in held.items():
        wanted = slope(lambda x, name=name: loss(name, x), value) * (g if name == "scale" else 1)
        grad = latent.leaves[name].grad
        assert grad is not None
        assert torch.allclose(grad, wanted, atol=2e-2, rtol=1e-2), name


def test_learned_steps_start_at_what_rounding_lost() -> None:
    """At codes that nothing was rounded for, the scale has no gradient: why `Scaled` is there."""
    q = rtn(weight_of(5), None, spec_of(4))
    inner = dequantize(q) * 0.999  # just inside the ends
    for weight, is_zero in ((inner, True), (weight_of(5), False)):
        latent = Stepped(weight, q)
        latent.take(weight_of(6))
        grad = latent.leaves["scale"].grad
        assert grad is not None
        assert bool((grad.abs() < 2e-3).all()) is is_zero


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_under_minmax_follow_the_estimator(scheme: str) -> None:
    """Nothing is beyond the grid, so the rounded weight moves as the weight does: compared where
    the largest of a group, and with it every scale, stays."""
    weight, towards = weight_of(7), weight_of(8)
    spec = parse_scheme(scheme).weight
    spec = spec_of(spec.grid.bits) if isinstance(spec.grid, IntGrid) else spec
    latent = MinMax(weight, rtn(weight, None, spec, search="absmax"))
    added = latent.value() - weight  # by rounding
    latent.take(towards)
    leaf, unit = latent.leaves["code"], weight / latent.leaves["code"]
    found = slope(lambda x: ((x * unit + added) * towards).double().sum(), leaf)
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, found, atol=2e-2, rtol=1e-2)


def test_plain_parameters_are_stored_numbers() -> None:
    latent = Plain(weight_of(3), torch.bfloat16)
    latent.take(torch.ones(6, 64))
    assert latent.value().dtype == torch.bfloat16
    assert torch.equal(latent.leaves["plain"].grad, torch.ones(6, 64))  # type: ignore[arg-type]


def test_layouts_without_plain_scales_are_refused() -> None:
    k_quant = QuantizedLinear(torch.zeros(2, 256, dtype=torch.uint8), torch.ones(2, 8),
                              parse_scheme("Q4_K").weight)  # fmt: skip
    with pytest.raises(BadRequest, match="cannot be learned"):
        Scaled(k_quant)


def test_inputs_pass_gradients_inside_their_range() -> None:
    x = torch.tensor([[0.1, -3.0, 5.0, 0.7]], requires_grad=True)
    dynamic = parse_scheme("W8A8-INT8").input
    assert dynamic is not None
    straight_through_input(x, dynamic).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 4))  # type: ignore[arg-type]
    static = parse_scheme("W8A8-INT8").with_activations("static").input
    assert static is not None
    x.grad = None
    straight_through_input(x, static, torch.tensor([2.0 / 127])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0, 0, 1]]))  # type: ignore[arg-type]


def test_cached_states_pass_gradients() -> None:
    x = torch.randn(1, 2, 5, 16, requires_grad=True)
    spec = parse_scheme("W4A8KV4").kv_cache
    assert spec is not None
    out = straight_through_states(x, spec, None)
    assert not torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))  # type: ignore[arg-type]
