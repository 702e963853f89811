"""GGUF's K types: stored exactly, better than simpler grids, better with statistics."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize

from bitwright.formats import get_format
from bitwright.formats.gguf import BLOCK_SHAPES, blocks
from bitwright.methods.kquant import kquant
from bitwright.methods.objective import relative_output_error
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.super_blocks import units_and_factors
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme
from bitwright.schemes.stats import InputStats

KINDS = ("Q4_K", "Q5_K", "Q6_K")
NAME = "layer"
FORMAT = get_format("gguf")


def correlated(width: int, seed: int = 0) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(4 * width, width, generator=generator) @ (mix + 0.3 * torch.eye(width))
    x *= torch.exp(torch.randn(width, generator=generator))
    return InputStats(x.T @ x / len(x), x.abs().mean(0), x.abs().amax(0), tokens=len(x))


def weight_of(rows: int, cols: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.02


def read_by_gguf(data: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf_dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_any_blocks_are_read_as_the_gguf_package_reads_them(kind: str) -> None:
    generator = np.random.default_rng(0)
    size = BLOCK_SHAPES[kind][1]
    data = generator.integers(0, 256, (40, 2, size), dtype=np.uint8)
    units = generator.normal(scale=0.01, size=(40, 2, 2)).astype(np.float16)
    if kind == "Q6_K":
        data[..., -2:] = units[..., :1].view(np.uint8)
    else:
        data[..., :4] = units.view(np.uint8)
    stored = torch.from_numpy(data.reshape(40, -1))
    q = FORMAT.decode(NAME, {f"{NAME}.gguf_blocks": stored}, {"types": {NAME: kind}})
    assert q.spec == parse_scheme(kind).weight
    assert torch.equal(dequantize(q), read_by_gguf(stored, kind))
    assert torch.equal(read_by_gguf(blocks(q), kind), dequantize(q))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_chosen_is_stored_exactly(kind: str, calibrated: bool) -> None:
    spec = parse_scheme(kind).weight
    stats = correlated(512) if calibrated else None
    q = kquant(weight_of(24, 512), stats, spec, damp=0.01 if calibrated else None)
    data = FORMAT.encode(NAME, q)
    config = FORMAT.config({NAME: Scheme(spec)}, [])
    back = FORMAT.decode(NAME, data, config)
    assert torch.equal(back.codes_OI, q.codes_OI)
    assert torch.equal(back.scale_RG, q.scale_RG)
    assert torch.equal(dequantize(back), dequantize(q))
    assert torch.equal(read_by_gguf(data[f"{NAME}.gguf_blocks"], kind), dequantize(q))
    stored = data[f"{NAME}.gguf_blocks"].numel() * 8 / q.codes_OI.numel()
    assert q.bits_per_weight == pytest.approx(stored)


@pytest.mark.parametrize(
    ("kind", "simple"),
    [("Q4_K", Spec(IntGrid(4, False), (1, 32), torch.float16, True)),
     ("Q5_K", Spec(IntGrid(5, False), (1, 32), torch.float16, True)),
     ("Q6_K", Spec(IntGrid(6), (1, 32), torch.float16))],
)  # fmt: skip
def test_errors_are_smaller_than_those_of_simple_groups(kind: str, simple: Spec) -> None:
    weight = weight_of(64, 512)

    def error(spec: Spec) -> float:
        q = kquant(weight, None, spec) if spec.super_blocks else rtn(weight, None, spec)
        return float((dequantize(q) - weight).norm())

    assert error(parse_scheme(kind).weight) < 0.97 * error(simple)


@pytest.mark.parametrize("kind", KINDS)
def test_importance_and_compensation_each_lower_the_output_error(kind: str) -> None:
    weight, stats, spec = weight_of(32, 512), correlated(512), parse_scheme(kind).weight
    plain, weighted, compensated = (
        relative_output_error(weight, dequantize(q), stats.hessian_II)
        for q in (
            kquant(weight, None, spec),
            kquant(weight, stats, spec),
            kquant(weight, stats, spec, damp=0.01),
        )
    )
    assert weighted < 0.95 * plain
    assert compensated < 0.8 * weighted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-9, -0.3, 1e4])
def test_constant_weights_survive(kind: str, value: float) -> None:
    weight = torch.full((4, 256), value)
    q = kquant(weight, None, parse_scheme(kind).weight)
    assert bool((dequantize(q) - weight).abs().max() <= 0.02 * abs(value) + 1e-6)
    assert torch.equal(read_by_gguf(blocks(q), kind), dequantize(q))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_without_input_stay_close_to_zero(kind: str) -> None:
    stats = correlated(256)
    stats.hessian_II[:, 7] = stats.hessian_II[7, :] = 0
    q = kquant(weight_of(8, 256), stats, parse_scheme(kind).weight, damp=0.01)
    assert float(dequantize(q)[:, 7].abs().max()) <= float(q.scale_RG.abs().max())


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_groups_of_zeros_cost_their_neighbours_nothing(kind: str) -> None:
    spec, weight = parse_scheme(kind).weight, weight_of(16, 256)

    def error(weight: torch.Tensor) -> float:
        kept = dequantize(kquant(weight, None, spec), torch.float32)
        return float((kept - weight).norm() / weight.norm())

    before = error(weight)
    weight[:, 64:] = 0
    assert error(weight) < 1.2 * before


def test_units_are_found_or_refused() -> None:
    unit = torch.tensor([[0.0123], [3e-5]]).half().float()
    factor = torch.tensor([[63, 1, 0, 17], [2, 2, 40, 31]])
    found, again = units_and_factors(unit * factor, IntGrid(6, False))
    assert torch.equal(found.float() * again, unit * factor)
    with pytest.raises(ValueError, match="whole multiples"):
        units_and_factors(torch.tensor([[1.0, 0.3337]]), IntGrid(6, False))
