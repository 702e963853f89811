"""Which kernel takes which layer, the operators, and whole models through interpreted Triton."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitwright.api import load, quantize
from bitwright.errors import BadRequest
from bitwright.kernels.dispatch import interpreted, pack, product, why_not
from bitwright.kernels.layouts import CpuWeight, EightBitWeight, GpuWeight
from bitwright.kernels.reference import linear, tolerance
from bitwright.methods.kquant import kquant
from bitwright.methods.rtn import rtn
from bitwright.runtime.linear import PackedLinear
from bitwright.runtime.load import load_model
from bitwright.runtime.source import resolve
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme, parse_scheme

pytest.importorskip("triton", reason="NOT TESTED: Triton is not installed")

W4, INT8, FP8, Q4_K = map(parse_scheme, ("W4A16", "W8A8-INT8", "W8A8-FP8", "Q4_K"))
SCHEMES = {
    "W4A16": W4, "W4A16 asymmetric": W4.with_weight(group_size=32, asymmetric=True),
    "W8A16": parse_scheme("W8A16"), "NVFP4A16": parse_scheme("NVFP4A16"),
    "W8A8-INT8": INT8, "W8A8-FP8": FP8, "W8A8-FP8 block": FP8.with_granularity("block"),
}  # fmt: skip
UTILS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")


def layer(scheme: Scheme, rows: int = 40, cols: int = 256) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(rows)
    q = rtn(torch.randn(rows, cols, generator=generator), None, scheme.weight, search="absmax")
    bias = torch.randn(rows, generator=generator)
    return replace(q, bias_O=bias, input_spec=scheme.input)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_interpreter_stands_in_for_a_gpu(name: str) -> None:
    q = layer(SCHEMES[name])
    assert interpreted()
    assert why_not(q, "cuda") == ""
    packed = PackedLinear(q, device="cuda")
    x = torch.randn(2, 3, 256).half()
    found = packed(x)
    assert found.shape == (2, 3, 40)
    assert found.dtype == torch.float16
    off = (found.float() - linear(x.float(), q)).abs().view(6, 40)
    assert (off <= tolerance(x.view(6, 256), q, 2e-3)).all()


def arguments(w: GpuWeight | EightBitWeight) -> tuple[object, ...]:
    if isinstance(w, GpuWeight):
        return (w.words_BOS, w.scale_GO, w.zero_GO, w.locks, w.bias_O, w.order_I, *w.shape,
                w.group_size, w.middle, w.factor, w.bits)  # fmt: skip
    return (w.codes_OI, w.scale, w.bias_O, w.input_scale)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["W4A16 asymmetric", "W8A8-INT8", "W8A8-FP8 block"])
def test_operators_are_registered_whole(name: str) -> None:
    w = pack(layer(SCHEMES[name], rows=5), "cuda")
    assert isinstance(w, (GpuWeight, EightBitWeight))
    ops = torch.ops.bitwright
    op = ops.w4a16_triton if isinstance(w, GpuWeight) else ops.w8a8_triton
    x = torch.randn(2, 3, 256).half()
    if name != "W8A8-FP8 block":  # opcheck itself cannot compare float8
        torch.library.opcheck(op.default, (x, *arguments(w)), test_utils=UTILS)
    compiled = torch.compile(lambda x: product(x, w) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), product(x, w) + 1)


def test_shapes_are_known_without_a_gpu() -> None:
    for name in ("W4A16", "W8A8-FP8"):
        q = layer(SCHEMES[name])
        with FakeTensorMode(allow_non_fake_inputs=True):
            x = torch.empty(2, 7, 256, dtype=torch.bfloat16, device="cuda")
            out = product(x, pack(q, "cuda"))
        assert out.shape == (2, 7, 40)
        assert out.dtype == torch.bfloat16
        assert out.device.type == "cuda"


class Watch(TorchDispatchMode):
    """Records the operators that run, with the sizes of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(out.shape) if isinstance(out, torch.Tensor) else ()))
        return out


@pytest.mark.parametrize("name", ["W4A16", "W8A8-INT8"])
def test_nothing_waits_or_depends_on_values(name: str) -> None:
    """What CUDA graphs need: no number is read back, and the same memory is asked for every time.

    Kernels run in the interpreter, beneath what is watched; their launches are all that differs
    on a GPU.
    """
    w = pack(layer(SCHEMES[name], cols=1152 if name == "W4A16" else 256), "cuda")
    runs = []
    for x in (torch.zeros(4, w.shape[1]), torch.randn(4, w.shape[1]) * 100):
        with Watch() as watch:
            if isinstance(w, GpuWeight):
                from bitwright.kernels.triton_w4a16 import w4a16

                w4a16(x.half(), w)
            else:
                from bitwright.kernels.triton_w8a8 import w8a8

                w8a8(x.half(), w)
        runs.append(watch.seen)
    assert runs[0] == runs[1]
    assert len(runs[0]) > 2
    waits = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "unique")
    assert not [op for op, _ in runs[0] if any(word in op for word in waits)]


@pytest.mark.parametrize(
    "options",
    [
        {"format": "gptq"}, {"format": "awq", "asymmetric": True}, {"format": "compressed-tensors"},
        {"scheme": "NVFP4A16"}, {"scheme": "W8A8-FP8"}, {"scheme": "W8A16"},
    ],
)  # fmt: skip
def test_models_of_every_format_are_packed_for_gpus(
    options: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    grouped = {} if "scheme" in options and options["scheme"] != "W8A16" else {"group_size": 32}
    quantize(llama, tmp_path / "out", **grouped, **options)
    packed, _ = load(tmp_path / "out", packed=True, device="cuda")
    kinds = {type(m._packed) for m in packed.modules() if isinstance(m, PackedLinear)}
    assert kinds == {EightBitWeight if options.get("scheme") == "W8A8-FP8" else GpuWeight}
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    plain = load_model(resolve(tmp_path / "out"), dtype=torch.float32)
    tokens = torch.arange(20, 28).view(1, 8)
    with torch.no_grad():
        wanted = plain(input_ids=tokens).logits
        found = packed.half()(input_ids=tokens).logits.float()
    if options.get("scheme") == "W8A8-FP8":  # an input that is nearly a tie may round apart
        assert (found - wanted).abs().mean() < 0.15 * wanted.abs().mean()
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=2e-2)


def test_float32_inputs_are_multiplied_by_the_dequantized_weight() -> None:
    q = layer(W4)
    x = torch.randn(3, 256)
    torch.testing.assert_close(product(x, pack(q, "cuda")), linear(x, q), rtol=1e-5, atol=1e-4)


def test_a_move_keeps_storage_and_refuses_the_wrong_device(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PackedLinear(layer(W4))
    assert isinstance(packed._packed, CpuWeight)
    packed.half().float()
    assert packed._packed.table.dtype == torch.bfloat16
    assert packed.scale_TGN is packed._packed.scale_TGN
    on_gpu = PackedLinear(layer(W4), device="cuda")
    on_gpu.to("cpu")  # where the interpreter wants it
    monkeypatch.setattr("bitwright.runtime.linear.interpreted", lambda: False)
    with pytest.raises(BadRequest, match="packed for cuda and cannot run on cpu: load the model"):
        on_gpu.to("cpu")


def test_what_no_kernel_takes_is_named() -> None:
    q = layer(W4)
    assert "no kernel for mps" in why_not(q, "mps")
    with pytest.raises(BadRequest, match="cannot be packed: there is no kernel for mps"):
        pack(q, "mps")
    assert "super-blocks" in why_not(kquant(torch.randn(4, 256), None, Q4_K.weight), "cuda")


def test_rounded_inputs_and_layers_without_a_kernel_run_on_gpus_too() -> None:
    x = torch.randn(3, 256).half()
    for q in (replace(layer(W4), input_spec=INT8.input),
              kquant(torch.randn(40, 256), None, Q4_K.weight)):  # fmt: skip
        off = (PackedLinear(q, device="cuda")(x).float() - linear(x.float(), q)).abs()
        assert (off <= tolerance(x, q, 1e-2)).all()
    panels = PackedLinear(q, device="cuda").to(torch.device("cpu"))
    assert panels.by_panels
    assert panels.codes is panels._packed.codes


def test_a_machine_without_triton_or_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\n"
        "from bitwright.kernels.dispatch import why_not_triton\n"
        "print('triton' in sys.modules, why_not_triton())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "False there is no GPU here"
    monkeypatch.setattr("bitwright.kernels.dispatch.find_spec", lambda name: None)
    assert "Triton is not installed" in why_not(layer(W4), "cuda")
