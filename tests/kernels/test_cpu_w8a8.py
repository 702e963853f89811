"""INT8 products against the specification: integers are exact, only scaling rounds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.kernels.cpu_w8a8 import round_to_int8, w8a8_int8, why_not_int8
from bitwright.kernels.dispatch import product
from bitwright.kernels.layouts import pack_eight_bits
from bitwright.kernels.reference import linear
from bitwright.methods.rtn import rtn
from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import parse_scheme


def layer(rows: int, cols: int, seed: int, *, static: bool, per_tensor: bool) -> QuantizedLinear:
    scheme = parse_scheme("W8A8-INT8")
    if static:
        scheme = scheme.with_activations("static")
    if per_tensor:
        scheme = scheme.with_granularity("tensor")
    generator = torch.Generator().manual_seed(seed)
    q = rtn(torch.randn(rows, cols, generator=generator), None, scheme.weight)
    scale = torch.tensor([0.02]) if static else None
    bias = torch.randn(rows, generator=generator)
    return replace(q, bias_O=bias, input_spec=scheme.input, input_scale=scale)


@given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 90),
    cols=st.integers(2, 200),
    seed=st.integers(0, 99),
    static=st.booleans(),
    per_tensor=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_products_are_the_specified_ones(
    tokens: int, rows: int, cols: int, seed: int, static: bool, per_tensor: bool, dtype: torch.dtype
) -> None:
    q = layer(rows, cols, seed, static=static, per_tensor=per_tensor)
    assert why_not_int8(q) == ""
    x = torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    codes, scale = round_to_int8(x, q.input_scale)
    assert q.input_spec is not None
    rounded = round_input(x.float(), q.input_spec, q.input_scale)
    torch.testing.assert_close(codes.float() * scale, rounded, rtol=1e-6, atol=1e-7)
    found, wanted = w8a8_int8(x.float(), pack_eight_bits(q)), linear(x.float(), q)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert w8a8_int8(x, pack_eight_bits(q)).dtype == dtype


def test_zero_inputs_are_zero() -> None:
    q = layer(5, 16, 0, static=False, per_tensor=False)
    out = w8a8_int8(torch.zeros(3, 16), pack_eight_bits(q))
    assert q.bias_O is not None
    assert torch.equal(out, q.bias_O.expand(3, 5))


@pytest.mark.filterwarnings("ignore")
def test_the_operator_compiles_whole() -> None:
    w = pack_eight_bits(layer(5, 16, 0, static=False, per_tensor=False))
    x = torch.randn(2, 3, 16)
    compiled = torch.compile(lambda x: product(x, w), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), product(x, w))
    torch.library.opcheck(
        torch.ops.bitwright.w8a8_cpu.default, (x, w.codes_OI, w.scale, w.bias_O, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_what_is_not_int8_is_named() -> None:
    fp8 = parse_scheme("W8A8-FP8")
    q = replace(rtn(torch.randn(4, 16), None, fp8.weight), input_spec=fp8.input)
    assert "not both signed INT8" in why_not_int8(q)
    assert "columns" in why_not_int8(layer(4, 1, 0, static=False, per_tensor=False))
