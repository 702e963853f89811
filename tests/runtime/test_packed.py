"""Packed Linears: the dequantized model's logits, a quarter of its memory, torch.compile."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bitwright.api import generate, load, quantize
from bitwright.kernels.cpu_build import why_not_compiled
from bitwright.kernels.dispatch import product, why_not
from bitwright.methods.rtn import rtn
from bitwright.runtime.linear import PackedLinear
from bitwright.schemes.scheme import parse_scheme

pytestmark = pytest.mark.skipif(bool(why_not_compiled()), reason=why_not_compiled() or "compiled")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers of the Linears of the blocks."""
    return sum(
        tensor.nbytes
        for name, module in model.named_modules()
        if ".layers." in name
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    )


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


def test_other_widths_are_dequantized(llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "out", scheme="W8A16", group_size=32)
    packed, _ = load(tmp_path / "out", packed=True)
    assert not any(isinstance(module, PackedLinear) for module in packed.modules())


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


def test_other_devices_have_no_kernel_yet() -> None:
    q = rtn(torch.randn(8, 128), None, parse_scheme("W4A16").weight)
    assert "no kernel for cuda" in why_not(q, "cuda")


def test_inputs_of_four_bits_are_not_left_unrounded() -> None:
    q = rtn(torch.randn(8, 128), None, parse_scheme("W4A16").weight)
    assert why_not(replace(q, input_spec=parse_scheme("W4A8").input)) != ""
