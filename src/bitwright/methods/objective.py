"""The one yardstick: how far the quantized layer's output is from the original's."""

import torch
from torch import Tensor


def output_error(weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor) -> float:
    """trace((W - Q) H (W - Q)ᵀ): mean over tokens of the squared distance of the outputs."""
    difference = weight_OI - quantized_OI
    return float(((difference @ hessian_II) * difference).sum())


def relative_output_error(weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor) -> float:
    """`output_error` over the mean squared length of the original output, trace(W H Wᵀ)."""
    power = float(((weight_OI @ hessian_II) * weight_OI).sum())
    error = output_error(weight_OI, quantized_OI, hessian_II)
    return error / power if power > 0 else 0.0


def row_errors(
    weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Each output row's part of trace((W - Q) H (W - Q)ᵀ) and of trace(W H Wᵀ), both (O,).

    Without a hessian inputs are taken as white: squared distance and length of the weights.
    """
    difference_OI = weight_OI - quantized_OI
    if hessian_II is None:
        return difference_OI.square().sum(1), weight_OI.square().sum(1)
    error_O = torch.linalg.vecdot(difference_OI @ hessian_II, difference_OI)
    return error_O, torch.linalg.vecdot(weight_OI @ hessian_II, weight_OI)


def relative_weight_error(weight_OI: Tensor, quantized_OI: Tensor) -> float:
    """Squared distance of the weights over their squared length: the error for white inputs."""
    error_O, power_O = row_errors(weight_OI, quantized_OI, None)
    power = float(power_O.sum())
    return float(error_O.sum()) / power if power > 0 else 0.0
