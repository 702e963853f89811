"""Packed products as torch operators: which kernel takes a layer, on which device.

`pack` stores a layer for the kernel of a device, or for `panels` where there is none, and
`product` runs it. Operators have fake kernels,
so torch.compile keeps graphs whole; those for GPUs neither wait for the device nor allocate by what
tensors hold, so CUDA graphs capture them. Importing needs neither a compiler, Triton nor a GPU.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.kernels.cpu_w4a16 import w4a16, why_not_compiled
from bitwright.kernels.cpu_w8a8 import w8a8_int8, why_not_int8
from bitwright.kernels.layouts import (
    CpuWeight,
    EightBitWeight,
    GpuWeight,
    pack_eight_bits,
    pack_for_cpu,
    pack_for_gpu,
    why_not_eight_bits,
    why_not_on_gpu,
    why_not_packed,
)
from bitwright.kernels.panels import PanelWeight, by_panels, pack_panels
from bitwright.numerics.grids import IntGrid
from bitwright.schemes.quantized import QuantizedLinear

Packed = CpuWeight | GpuWeight | EightBitWeight | PanelWeight


def why_not(q: QuantizedLinear, device: torch.device | str = "cpu") -> str:
    """Why no kernel takes this layer there; "" if one does."""
    device = torch.device(device)
    if device.type == "cpu":
        if not why_not_int8(q):
            return ""
        return why_not_packed(_weights_only(q)) or why_not_compiled()
    if device.type != "cuda":
        return f"there is no kernel for {device}"
    if reason := why_not_triton(device):
        return reason
    if why_not_eight_bits(q):
        return why_not_on_gpu(_weights_only(q))
    if not isinstance(q.spec.grid, IntGrid) and _capability(device) < (8, 9):
        return "this GPU has no FP8 tensor cores"
    return ""


def why_not_triton(device: torch.device | str = "cuda") -> str:
    """Why Triton kernels cannot run there; "" if they can, or are interpreted (on CPU tensors)."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install 'bitwright[triton]')"
    if interpreted():
        return ""
    if not torch.cuda.is_available():
        return "there is no GPU here"
    if _capability(torch.device(device)) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or newer"
    return ""


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was imported: for tests, without a GPU."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def pack(q: QuantizedLinear, device: torch.device | str = "cpu") -> Packed:
    """A layer in the storage of that device's kernel, or as panels, still where ``q`` is.

    `rounds_inputs` tells whether `product` rounds its input itself. Raises BadRequest for a device
    other than a CPU or a GPU.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise BadRequest(f"this layer cannot be packed: {why_not(q, device)}")
    if why_not(q, device):
        return pack_panels(_weights_only(q))
    if not (why_not_int8(q) if kind == "cpu" else why_not_eight_bits(q)):
        return replace(pack_eight_bits(q), on_gpu=kind == "cuda")
    q = _weights_only(q)
    return pack_for_gpu(q) if kind == "cuda" else pack_for_cpu(q)


def rounds_inputs(w: Packed) -> bool:
    """Whether `product` does what the layer's input spec says; else its caller has to."""
    return isinstance(w, EightBitWeight)


def _weights_only(q: QuantizedLinear) -> QuantizedLinear:
    return replace(q, input_spec=None, input_scale=None)


def product(x: Tensor, w: Packed) -> Tensor:
    """x Wᵀ + bias for x of any leading shape, (..., I) -> (..., O) in ``x``'s dtype."""
    if isinstance(w, PanelWeight):
        return by_panels(x, w)
    if isinstance(w, CpuWeight):
        if type(x) is Tensor and not torch.compiler.is_compiling():  # half the cost of a call
            return w4a16(x.reshape(-1, w.shape[1]), w).view(*x.shape[:-1], w.shape[0])
        return torch.ops.bitwright.w4a16_cpu(  # type: ignore[no-any-return]
            x, w.words_TKJL, w.scale_TGN, w.zero_TGN, w.table, w.bias_O, w.order_I,
            w.shape[0], w.shape[1], w.group_size, w.factor,
        )  # fmt: skip
    if isinstance(w, GpuWeight):
        return torch.ops.bitwright.w4a16_triton(  # type: ignore[no-any-return]
            x, w.words_BOS, w.scale_GO, w.zero_GO, w.locks, w.bias_O, w.order_I,
            w.shape[0], w.shape[1], w.group_size, w.middle, w.factor, w.bits,
        )  # fmt: skip
    run = torch.ops.bitwright.w8a8_triton if w.on_gpu else torch.ops.bitwright.w8a8_cpu
    return run(x, w.codes_OI, w.scale, w.bias_O, w.input_scale)  # type: ignore[no-any-return]


def _capability(device: torch.device) -> tuple[int, int]:
    """(9, 0) where kernels are interpreted, or on AMD's, which Triton serves alike."""
    if interpreted() or torch.version.hip:
        return (9, 0)
    return torch.cuda.get_device_capability(device)


@torch.library.custom_op("bitwright::w4a16_cpu", mutates_args=())
def _w4a16_cpu(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    factor: float,
) -> Tensor:
    weight = CpuWeight(words, scale, zero, table, bias, order, (rows, cols), group_size, factor)
    return w4a16(x.reshape(-1, cols), weight).view(*x.shape[:-1], rows)


# ``locks`` is zero before and after: seen from outside nothing is changed.
@torch.library.custom_op("bitwright::w4a16_triton", mutates_args=())
def _w4a16_triton(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    locks: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    rows: int,
    cols: int,
    group_size: int,
    middle: int | None,
    factor: float,
    bits: int,
) -> Tensor:
    from bitwright.kernels import triton_w4a16

    weight = GpuWeight(
        words, scale, zero, locks, bias, order, (rows, cols), group_size, middle, factor, bits
    )
    return triton_w4a16.w4a16(x.reshape(-1, cols), weight).view(*x.shape[:-1], rows)


@torch.library.custom_op("bitwright::w8a8_cpu", mutates_args=())
def _w8a8_cpu(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    weight = EightBitWeight(codes, scale, bias, input_scale)
    return w8a8_int8(x.reshape(-1, codes.shape[1]), weight).view(*x.shape[:-1], codes.shape[0])


@torch.library.custom_op("bitwright::w8a8_triton", mutates_args=())
def _w8a8_triton(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    from bitwright.kernels import triton_w8a8

    weight = EightBitWeight(codes, scale, bias, input_scale)
    out = triton_w8a8.w8a8(x.reshape(-1, codes.shape[1]), weight)
    return out.view(*x.shape[:-1], codes.shape[0])


@_w4a16_cpu.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], _size(rest[6])))


@_w4a16_triton.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], _size(rest[6])))


@_w8a8_cpu.register_fake
def _(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@_w8a8_triton.register_fake
def _(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _size(value: object) -> int:
    assert isinstance(value, int)
    return value
