"""W8A8 on a CPU: INT8 codes of weights and inputs multiplied as integers.

The product of codes is exact (int32 sums; torch._int_mm, which uses VNNI where there is any);
scales are applied to the sums. Inputs are rounded here, as `schemes.inputs.round_input` has it.
"""

import torch
from torch import Tensor

from bitwright.kernels.layouts import EightBitWeight, why_not_eight_bits
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import PER_TOKEN
from bitwright.numerics.scales import store_scale
from bitwright.schemes.inputs import covered
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Spec

LONGEST = 1 << 16  # columns whose int32 sums cannot overflow: 2^16 * 2^7 * 2^7 = 2^30


def why_not_int8(q: QuantizedLinear) -> str:
    """Why this kernel does not take a layer; "" if it does."""
    if reason := why_not_eight_bits(q):
        return reason
    if q.spec.grid != IntGrid(8):
        return "weights and inputs are not both signed INT8"
    if not 1 < q.shape[1] <= LONGEST:  # torch._int_mm (2.13) is wrong for one column
        return f"{q.shape[1]} columns; the kernel takes 2 to {LONGEST}"
    return ""


def round_to_int8(x_MI: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 codes (M, I), float32 scale (M, 1) or (1,)), as `round_input` rounds."""
    x = x_MI.float()
    if input_scale is None:
        amax_M1 = x.abs().amax(-1, keepdim=True)
        scale = store_scale(amax_M1 / covered(_INPUT), torch.float32)
    else:
        scale = input_scale
    return (x / scale).round_().clamp_(-128, 127).to(torch.int8), scale


def w8a8_int8(x_MI: Tensor, w: EightBitWeight) -> Tensor:
    """x W^T + bias, (M, I) -> (M, O) in ``x_MI``'s dtype."""
    codes_MI, scale = round_to_int8(x_MI, w.input_scale)
    out = torch._int_mm(codes_MI, w.codes_OI.t()).float().mul_(scale).mul_(w.scale)
    if w.bias_O is not None:
        out += w.bias_O
    return out.to(x_MI.dtype)


_INPUT = Spec(IntGrid(8), PER_TOKEN, scale=torch.float32, mode="dynamic")
