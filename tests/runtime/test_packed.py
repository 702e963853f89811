"""Packed Linears: the dequantized model's logits in the memory of their codes, torch.compile."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.models import make_model
from torch.nn.functional import linear

from bitwright.api import generate, load, quantize
from bitwright.kernels import panels
from bitwright.kernels.cpu_w4a16 import why_not_compiled
from bitwright.kernels.dispatch import product
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import IntGrid
from bitwright.runtime.linear import PackedLinear
from bitwright.runtime.load import load_model
from bitwright.runtime.source import resolve
from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Spec, parse_scheme

compiled = pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled() or "compiled")


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With whole 128 x 128 blocks."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256)


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of the Linears of the blocks."""
    return sum(
        tensor.nbytes
        for name, module in model.named_modules()
        if ".layers." in name
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


@compiled
@pytest.mark.parametrize("options", [{}, {"asymmetric": True}, {"format": "gptq"}])
def test_packed_models_compute_the_same_in_less_memory(
    options: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "out", group_size=32, **options)
    plain, _ = load(tmp_path / "out")
    packed, _ = load(tmp_path / "out", packed=True)
    kinds = [type(m) for n, m in packed.named_modules() if n.endswith("_proj")]
    assert kinds == [PackedLinear] * 14
    tokens = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        wanted, found = (m.float()(input_ids=tokens).logits for m in (plain, packed))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    assert weight_bytes(packed) < 0.4 * weight_bytes(plain.bfloat16())
    assert len(generate(tmp_path / "out", "A quick", max_new_tokens=4)) > 0


@pytest.mark.parametrize("options", [{}, {"activations": "static"}, {"granularity": "tensor"}])
def test_int8_models_multiply_integers(
    options: dict[str, object], llama: Path, text: Path, tmp_path: Path
) -> None:
    quantize(llama, tmp_path / "out", scheme="W8A8-INT8", calibration=str(text), samples=8,
             sequence_length=32, **options)  # fmt: skip
    plain, _ = load(tmp_path / "out")
    packed, _ = load(tmp_path / "out", packed=True)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    tokens = torch.arange(20, 60).view(2, 20)
    with torch.no_grad():
        wanted, found = (m.float()(input_ids=tokens).logits for m in (plain, packed))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-2)  # a near tie may round apart
    assert float((found - wanted).abs().mean()) < 1e-3
    assert weight_bytes(packed) < 0.6 * weight_bytes(plain.bfloat16())


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({"scheme": "W8A16", "group_size": 32}, 8.5),
        ({"scheme": "W6A16", "group_size": 32}, 6.5),
        ({"scheme": "W3A16", "group_size": 32, "asymmetric": True}, 4.75),  # in 4 bits if compiled
        ({"scheme": "W2A16", "group_size": 32}, 4.5),
        ({"scheme": "W4A8-INT8", "group_size": 32}, 4.5),
        ({"scheme": "W4A8-FP8", "group_size": 32}, 4.5),
        ({"scheme": "W4A4", "group_size": 32}, 4.5),
        ({"scheme": "W8A8-FP8"}, 8.5),
        ({"scheme": "W8A8-FP8", "granularity": "tensor", "activations": "static"}, 8.1),
        ({"scheme": "W8A8-FP8", "granularity": "block"}, 8.1),
        ({"scheme": "NVFP4"}, 5),
        ({"scheme": "NVFP4A16"}, 5),
        ({"scheme": "MXFP4"}, 4.5),
        ({"scheme": "MXFP8"}, 8.25),
    ],
    ids=lambda value: value["scheme"] if isinstance(value, dict) else "",
)
def test_every_scheme_keeps_its_codes(
    options: dict[str, object], bits: float, wide_llama: Path, text: Path, tmp_path: Path
) -> None:
    quantize(wide_llama, tmp_path / "out", calibration=str(text), samples=4, sequence_length=32,
             **options)  # fmt: skip
    plain, _ = load(tmp_path / "out")
    packed, _ = load(tmp_path / "out", packed=True)
    linears = [m for n, m in packed.named_modules() if n.endswith("_proj")]
    assert {type(m) for m in linears} == {PackedLinear}
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            x = torch.randn(2, 5, module.in_features)
            with torch.no_grad():
                wanted = plain.get_submodule(name)(x)
            torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        packed(input_ids=torch.arange(20, 60).view(2, 20))
    weights = sum(m.in_features * m.out_features for m in linears)
    held = sum(tensor.nbytes for m in linears for tensor in m.buffers())
    assert held <= weights * bits / 8 * 1.02 + 64 * len(linears)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("cols", [64, 77])
def test_panels_are_the_specification(
    bits: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "PANEL", 5 * cols)
    for group in ((1, -1), (-1, -1), (4, 16)):
        spec = Spec(IntGrid(bits), group)
        q = replace(rtn(torch.randn(23, cols), None, spec), bias_O=torch.randn(23))
        x = torch.randn(3, 2, cols)
        wanted = linear(x, dequantize(q), q.bias_O)
        torch.testing.assert_close(panels.by_panels(x, panels.pack_panels(q)), wanted)


def test_generating_does_not_dequantize_in_every_step(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", scheme="W8A16", group_size=32)
    model = load_model(resolve(tmp_path / "out"), packed=True, panels=False)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@compiled
@pytest.mark.filterwarnings("ignore")
def test_the_operator_compiles_whole() -> None:
    q = rtn(torch.randn(96, 128), None, parse_scheme("W4A16").weight)
    layer = PackedLinear(q, torch.randn(96))
    x = torch.randn(2, 3, 128)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.library.opcheck(
        torch.ops.bitwright.w4a16_cpu.default,
        (x, layer._packed.words_TKJL, layer._packed.scale_TGN, None, layer._packed.table,
         layer._packed.bias_O, None, 96, 128, 128, 1.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    assert product(x, layer._packed).shape == (2, 3, 96)


@pytest.mark.parametrize("scheme", ["W4A8-INT8", "W4A8-FP8", "W4A4", "MXFP4"])
def test_rounded_inputs_of_packed_layers(scheme: str) -> None:
    parsed = parse_scheme(scheme)
    q = replace(rtn(torch.randn(8, 128), None, parsed.weight), input_spec=parsed.input)
    x = torch.randn(3, 128)
    assert parsed.input is not None
    wanted = linear(round_input(x, parsed.input), dequantize(q))
    torch.testing.assert_close(PackedLinear(q)(x), wanted)
    assert not torch.allclose(wanted, linear(x, dequantize(q)), rtol=1e-4)


def test_fp8_products_are_those_of_scaled_mm() -> None:
    scheme = parse_scheme("W8A8-FP8")
    assert scheme.input is not None
    q = replace(rtn(torch.randn(48, 64), None, scheme.weight), input_spec=scheme.input)
    x = torch.randn(5, 64)
    scale_T1 = x.abs().amax(-1, keepdim=True) / 448
    one = torch.ones(1)
    sums = torch._scaled_mm(
        (x / scale_T1).to(torch.float8_e4m3fn), q.codes_OI.view(torch.float8_e4m3fn).T, one, one,
        out_dtype=torch.float32,
    )  # fmt: skip
    wanted = sums * scale_T1 * q.scale_RG.float().T
    torch.testing.assert_close(PackedLinear(q)(x), wanted, rtol=1e-4, atol=1e-4)
