"""W8A8 on a CPU: INT8 codes of weights and inputs multiplied as integers.

The product of codes is exact (int32 sums; torch._int_mm, which uses VNNI where there is any);
scales are applied to the sums. Inputs are rounded here, as `schemes.inputs.round_input` has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, PER_TOKEN
from bitwright.numerics.rounding import decode
from bitwright.numerics.scales import store_scale
from bitwright.schemes.inputs import covered
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Spec

LONGEST = 1 << 16  # columns whose int32 sums cannot overflow: 2^16 * 2^7 * 2^7 = 2^30


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """``codes_OI``: int8. ``scale_O``: float32. ``input_scale``: float32 (1,), None if dynamic."""

    codes_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None
    input_scale: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes_OI.shape[0], self.codes_OI.shape[1])


def why_not_int8(q: QuantizedLinear) -> str:
    """Why this kernel does not take a layer; "" if it does."""
    spec, inputs = q.spec, q.input_spec
    eight = IntGrid(8)
    if inputs is None or spec.grid != eight or inputs.grid != eight:
        return "weights and inputs are not both signed INT8"
    if spec.group not in (PER_CHANNEL, PER_TENSOR) or spec.asymmetric:
        return "weights have no symmetric scale per channel or per tensor"
    per_token = inputs.mode == "dynamic" and inputs.group == PER_TOKEN
    if not (per_token or inputs.mode == "static") or inputs.scale != torch.float32:
        return "inputs have neither a float32 scale per token nor a static one"
    if not 1 < q.shape[1] <= LONGEST:  # torch._int_mm (2.13) is wrong for one column
        return f"{q.shape[1]} columns; the kernel takes 2 to {LONGEST}"
    return ""


def pack_int8(q: QuantizedLinear) -> Int8Weight:
    """The layer as the kernel reads it; check `why_not_int8` first."""
    codes = decode(q.codes_OI, q.spec.grid, torch.int16).to(torch.int8).contiguous()
    scale_O = q.scale_RG.float().flatten().expand(q.shape[0]).contiguous()
    static = q.input_spec is not None and q.input_spec.mode == "static"
    scale = q.input_scale.float() if static and q.input_scale is not None else None
    return Int8Weight(codes, scale_O, None if q.bias_O is None else q.bias_O.float(), scale)


def round_to_int8(x_MI: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 codes (M, I), float32 scale (M, 1) or (1,)), as `round_input` rounds."""
    x = x_MI.float()
    if input_scale is None:
        amax_M1 = x.abs().amax(-1, keepdim=True)
        scale = store_scale(amax_M1 / covered(_INPUT), torch.float32)
    else:
        scale = input_scale
    return (x / scale).round_().clamp_(-128, 127).to(torch.int8), scale


def w8a8_int8(x_MI: Tensor, w: Int8Weight) -> Tensor:
    """x W^T + bias, (M, I) -> (M, O) in ``x_MI``'s dtype."""
    codes_MI, scale = round_to_int8(x_MI, w.input_scale)
    out = torch._int_mm(codes_MI, w.codes_OI.t()).float().mul_(scale).mul_(w.scale_O)
    if w.bias_O is not None:
        out += w.bias_O
    return out.to(x_MI.dtype)


_INPUT = Spec(IntGrid(8), PER_TOKEN, scale=torch.float32, mode="dynamic")
