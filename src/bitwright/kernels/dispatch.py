"""Packed products as torch operators, so that they work inside torch.compile.

`pack` stores a layer for the kernel of a device, or for `panels` where there is none, and
`product` runs it. Only CPUs have kernels here so far; importing needs neither a compiler nor a
GPU.
"""

from dataclasses import replace

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.kernels.cpu_build import why_not_compiled
from bitwright.kernels.cpu_w4a16 import w4a16
from bitwright.kernels.cpu_w8a8 import Int8Weight, pack_int8, w8a8_int8, why_not_int8
from bitwright.kernels.layouts import CpuWeight, pack_for_cpu, why_not_packed
from bitwright.kernels.panels import PanelWeight, by_panels, pack_panels
from bitwright.schemes.quantized import QuantizedLinear

Packed = CpuWeight | Int8Weight | PanelWeight


def why_not(q: QuantizedLinear, device: torch.device | str = "cpu") -> str:
    """Why no kernel takes this layer there; "" if one does."""
    if torch.device(device).type != "cpu":
        return f"there is no kernel for {device} yet"
    if not why_not_int8(q):
        return ""
    return why_not_packed(_weights_only(q)) or why_not_compiled()


def pack(q: QuantizedLinear, device: torch.device | str = "cpu") -> Packed:
    """A layer in its kernel's storage, or as panels; raises BadRequest for another device.

    `rounds_inputs` tells whether `product` rounds its input itself.
    """
    if torch.device(device).type != "cpu":
        raise BadRequest(f"this layer cannot be packed: {why_not(q, device)}")
    if not why_not_int8(q):
        return pack_int8(q)
    q = _weights_only(q)
    return pack_panels(q) if why_not(q) else pack_for_cpu(q)


def rounds_inputs(w: Packed) -> bool:
    """Whether `product` does what the layer's input spec says; else its caller has to."""
    return isinstance(w, Int8Weight)


def _weights_only(q: QuantizedLinear) -> QuantizedLinear:
    return replace(q, input_spec=None, input_scale=None)


def product(x: Tensor, w: Packed) -> Tensor:
    """x Wᵀ + bias for x of any leading shape, (..., I) -> (..., O) in ``x``'s dtype."""
    if isinstance(w, PanelWeight):
        return by_panels(x, w)
    if isinstance(w, Int8Weight):
        return torch.ops.bitwright.w8a8_cpu(  # type: ignore[no-any-return]
            x, w.codes_OI, w.scale_O, w.bias_O, w.input_scale
        )
    out: Tensor = _w4a16(
        x, w.words_TKJL, w.scale_TGN, w.zero_TGN, w.table, w.bias_O, w.order_I,
        w.shape[0], w.shape[1], w.group_size, w.factor,
    )  # fmt: skip
    return out


@torch.library.custom_op("bitwright::w4a16_cpu", mutates_args=())
def _w4a16(
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


@_w4a16.register_fake
def _(x: Tensor, *rest: object) -> Tensor:
    rows = rest[6]
    assert isinstance(rows, int)
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("bitwright::w8a8_cpu", mutates_args=())
def _w8a8(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    rows, cols = codes.shape
    weight = Int8Weight(codes, scale, bias, input_scale)
    return w8a8_int8(x.reshape(-1, cols), weight).view(*x.shape[:-1], rows)


@_w8a8.register_fake
def _(x: Tensor, codes: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
