"""What every kernel computes: the weight dequantized, then an ordinary product."""

import torch
from torch import Tensor

from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import QuantizedLinear, dequantize


def linear(x_MI: Tensor, q: QuantizedLinear) -> Tensor:
    """x W^T + bias, (M, I) -> (M, O) in ``x_MI``'s dtype, computed in float32.

    The input is rounded first if the layer has an input spec.
    """
    x = x_MI if q.input_spec is None else round_input(x_MI, q.input_spec, q.input_scale)
    out_MO = x.float() @ dequantize(q, torch.float32).T
    if q.bias_O is not None:
        out_MO += q.bias_O.float()
    return out_MO.to(x_MI.dtype)


def tolerance(x_MI: Tensor, q: QuantizedLinear, relative: float) -> Tensor:
    """(M, O) float32: how far a kernel may be off, ``relative`` times the sum of magnitudes.

    The bound of a dot product: rounding errors scale with sum |x| |w|, not with the result.
    """
    return relative * (x_MI.float().abs() @ dequantize(q, torch.float32).abs().T + 1e-6)
