"""The 8-bit Triton kernels through the interpreter, against the specification."""

from dataclasses import replace

import pytest
import torch

triton_w8a8 = pytest.importorskip(
    "bitwright.kernels.triton_w8a8", reason="NOT TESTED: Triton is not installed"
)

from bitwright.kernels.reference import linear  # noqa: E402
from bitwright.methods.rtn import rtn  # noqa: E402
from bitwright.numerics.rounding import decode  # noqa: E402
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


def packed(q: QuantizedLinear) -> object:
    dtype = torch.int8 if q.spec.grid.bits == 8 and q.spec == KINDS["int8"].weight else None
    values = decode(q.codes_OI, q.spec.grid)
    codes = values.to(dtype or torch.float8_e4m3fn)
    per_channel = q.scale_RG.shape == (q.shape[0], 1)
    scale = q.scale_RG.float().flatten() if per_channel else q.scale_RG.float()
    return triton_w8a8.EightBitWeight(codes, scale.contiguous(), q.bias_O)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "rows", "cols"), SIZES)
def test_products_are_the_specified_ones(kind: str, tokens: int, rows: int, cols: int) -> None:
    if kind == "fp8 block":  # its specification knows whole groups of columns only
        cols = -(-cols // 128) * 128
    q = layer(kind, rows, cols)
    x = torch.randn(tokens, cols).half()
    found = triton_w8a8.w8a8(x, packed(q))
    assert found.dtype == torch.float16
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
    w = triton_w8a8.EightBitWeight(torch.full((3, 4096), 127, dtype=torch.int8), torch.ones(3))
    out = triton_w8a8.product(codes, torch.ones(2, 1), w, torch.float32)
    assert out.tolist() == [[float(127 * 127 * 4096)] * 3] * 2
