"""The CPU kernel against the specification: odd shapes, all group sizes, both paths."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.kernels.cpu_w4a16 import by_panels, compiled, w4a16, why_not_compiled
from bitwright.kernels.layouts import pack_for_cpu, pack_for_gpu, unpack_gpu, why_not_packed
from bitwright.kernels.reference import linear, tolerance
from bitwright.methods.rtn import rtn
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import parse_scheme

RELATIVE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def layer(
    rows: int, groups: int, size: int, seed: int, *, asymmetric: bool = False, name: str = "W4A16"
) -> QuantizedLinear:
    """A rounded random Linear with a bias."""
    generator = torch.Generator().manual_seed(seed)
    scheme = parse_scheme(name)
    if name.startswith("W"):
        scheme = scheme.with_weight(group_size=size, asymmetric=asymmetric)
    weight = torch.randn(rows, groups * abs(size), generator=generator)
    q = rtn(weight, None, scheme.weight)
    return replace(q, bias_O=torch.randn(rows, generator=generator))


@pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled() or "compiled")
@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 200),
    groups=st.integers(1, 5),
    size=st.sampled_from([32, 64, 128, -96]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_compiled_products_are_the_specified_ones(
    tokens: int, rows: int, groups: int, size: int, asymmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    scheme_size = -1 if size < 0 else size
    q = layer(rows, groups, abs(size), seed, asymmetric=asymmetric)
    if scheme_size == -1:
        scheme = parse_scheme("W4A16").with_weight(group_size=-1, asymmetric=asymmetric)
        q = replace(rtn(dequantize(q), None, scheme.weight), bias_O=q.bias_O)
    x = torch.randn(tokens, q.shape[1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    found, wanted = compiled(x, pack_for_cpu(q)), linear(x, q)
    assert found.dtype == dtype
    assert ((found.float() - wanted.float()).abs() <= tolerance(x, q, RELATIVE[dtype])).all()


@pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled() or "compiled")
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("size", [96, 128, -1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_sums_go_on_over_thousands_of_columns(tokens: int, size: int, asymmetric: bool) -> None:
    columns = 4992  # no multiple of a slice; one group of a row is cut
    scheme = parse_scheme("W4A16").with_weight(group_size=size, asymmetric=asymmetric)
    generator = torch.Generator().manual_seed(size)
    q = rtn(torch.randn(70, columns, generator=generator), None, scheme.weight, search="absmax")
    x = torch.randn(tokens, columns, generator=generator)
    found, wanted = compiled(x, pack_for_cpu(q)), linear(x, q)
    assert ((found - wanted).abs() <= tolerance(x, q, 2e-6)).all()


@pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled() or "compiled")
@pytest.mark.parametrize("asymmetric", [False, True])
def test_scales_far_apart_or_zero_are_no_matter(asymmetric: bool) -> None:
    q = layer(70, 12, 64, 3, asymmetric=asymmetric)
    generator = torch.Generator().manual_seed(0)
    scale_RG = torch.randn(70, 12, generator=generator) * 10.0 ** torch.randint(
        -30, 2, (70, 12), generator=generator
    )
    scale_RG[torch.rand(70, 12, generator=generator) < 0.1] = 0
    q = replace(q, scale_RG=scale_RG.to(q.scale_RG.dtype))
    x = torch.randn(7, q.shape[1], generator=generator)
    found, wanted = compiled(x, pack_for_cpu(q)), linear(x, q)
    assert torch.isfinite(found).all()
    assert ((found - wanted).abs() <= tolerance(x, q, 2e-6)).all()


@pytest.mark.parametrize("name", ["W2A16", "W3A16", "W4A16", "NVFP4A16"])
@pytest.mark.parametrize("dtype", RELATIVE)
def test_both_paths_agree_on_every_grid_of_four_bits(name: str, dtype: torch.dtype) -> None:
    q = layer(130, 3, 64, 7, name=name)
    x = torch.randn(9, q.shape[1]).to(dtype)
    w = pack_for_cpu(q)
    for found in (by_panels(x, w), w4a16(x, w)):
        off = (found.float() - linear(x, q).float()).abs()
        assert (off <= tolerance(x, q, RELATIVE[dtype])).all()


def test_packed_weights_take_four_bits() -> None:
    q = layer(256, 4, 128, 0)
    w = pack_for_cpu(q)
    assert w.words_TKJL.nbytes == 256 * 512 // 2
    assert w.scale_TGN.nbytes == 256 * 4 * 2


def test_columns_of_one_group_need_not_be_neighbours() -> None:
    q = layer(64, 4, 32, 1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        q, codes_OI=q.codes_OI[:, order], group_of_column_I=(torch.arange(128) // 32)[order]
    )
    x = torch.randn(5, 128)
    wanted = linear(x, shuffled)
    torch.testing.assert_close(wanted, linear(x[:, order.argsort()], q), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(w4a16(x, pack_for_cpu(shuffled)), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_gpu_layout_reads_back(asymmetric: bool) -> None:
    q = layer(48, 3, 64, 2, asymmetric=asymmetric)
    torch.testing.assert_close(unpack_gpu(pack_for_gpu(q)), dequantize(q))


@pytest.mark.parametrize(
    ("name", "reason"), [("W8A16", "8 bits"), ("W4A8-INT8", "input"), ("Q4_K", "super-blocks")]
)
def test_what_cannot_be_packed_says_why(name: str, reason: str) -> None:
    scheme = parse_scheme(name)
    if name == "Q4_K":
        from bitwright.methods.kquant import kquant

        q = kquant(torch.randn(4, 256), None, scheme.weight)
    else:
        q = rtn(torch.randn(8, 128), None, scheme.weight)
    assert reason in why_not_packed(replace(q, input_spec=scheme.input))
