"""The one yardstick: how far the quantized layer's output is from the original's."""

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


def relative_weight_error(weight_OI: Tensor, quantized_OI: Tensor) -> float:
    """Squared distance of the weights over their squared length: the error for white inputs."""
    power = float(weight_OI.square().sum())
    return float((weight_OI - quantized_OI).square().sum()) / power if power > 0 else 0.0
