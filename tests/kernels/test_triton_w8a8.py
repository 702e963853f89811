"""The 8-bit Triton kernels through the interpreter, against the specification."""

from dataclasses import replace

import pytest
import torch

triton_w8a8 = pytest.importorskip(
    "bitwright.kernels.triton_w8a8", reason="NOT TESTED: Triton is not installed"
)

from bitwright.kernels.layouts import EightBitWeight, pack_eight_bits  # noqa: E402
from bitwright.kernels.reference import linear  # noqa: E402
from bitwright.methods.rtn import rtn  # noqa: E402
from bitwright.schemes.inputs import round_input  # noqa: E402
from bitwright.schemes.quantized import QuantizedLinear  # noqa: E402
from bitwright.schemes.scheme import parse_scheme  # noqa: E402

KINDS = {
    "int8": parse_scheme("W8A8-INT8"),
    "fp8": parse_scheme("W8A8-FP8"),
    "fp8 block": parse_scheme("W8A8-FP8").with_granularity("block"),
}
SIZES = [(1, 1, 128), (3, 70, 40), (17, 65, 300), (70, 33, 129), (65, 130, 257)]


def layer(kind: str, rows: int, cols: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows * cols)
    q = rtn(torch.randn(rows, cols, generator=generator), None, KINDS[kind].weight)
    bias = torch.randn(rows, generator=generator)
    return replace(q, bias_O=bias, input_spec=KINDS[kind].input)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rows", "cols"), SIZES)
def test_products_are_the_specified_ones(kind: str, tokens: int, rows: int, cols: int) -> None:
    if kind == "fp8 block":  # its specification knows whole groups of columns only
        cols = -(-cols // 128) * 128
    q = layer(kind, rows, cols)
    x = torch.randn(tokens, cols).half()
    found = triton_w8a8.w8a8(x, pack_eight_bits(q))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), linear(x.float(), q), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_calibrated_scales_are_used(kind: str) -> None:
    static = KINDS[kind].with_activations("static")
    q = replace(layer(kind, 33, 200), input_spec=static.input, input_scale=torch.tensor([0.01]))
    x = torch.randn(5, 200).half()  # most of it is beyond the range
    found = triton_w8a8.w8a8(x, pack_eight_bits(q))
    torch.testing.assert_close(found.float(), linear(x.float(), q), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_rounded_as_specified(kind: str) -> None:
    spec = KINDS[kind].input
    assert spec is not None
    x = torch.randn(5, 384) * torch.tensor([[1e-3], [1], [30], [0], [1000]])
    blocks = kind == "fp8 block"
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    codes, scale = triton_w8a8.quantize_tokens(x, dtype, blocks=blocks)
    spread = scale.repeat_interleave(128, 1)[:, :384] if blocks else scale
    torch.testing.assert_close(codes.float() * spread, round_input(x, spec), rtol=1e-6, atol=1e-9)


def test_integer_sums_are_exact() -> None:
    codes = torch.full((2, 4096), 127, dtype=torch.int8)
    w = EightBitWeight(torch.full((3, 4096), 127, dtype=torch.int8), torch.ones(3))
    out = triton_w8a8.product(codes, torch.ones(2, 1), w, torch.float32)
    assert out.tolist() == [[float(127 * 127 * 4096)] * 3] * 2
