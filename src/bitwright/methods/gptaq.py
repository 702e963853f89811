"""GPTAQ's target: the output of the original model, not of the weights behind rounded inputs.

A layer behind quantized ones reads x~ where the original reads x. What it should put out is W x,
so the codes Q are to make the mean of |Q x~ - W x|^2 small. With H = mean of x~ x~ᵀ and
D = mean of (x - x~) x~ᵀ this is, up to a constant that no Q changes,

    trace((Q - W') H (Q - W')ᵀ)        W' = W + W D H⁻¹

that is, the usual objective for other weights (Li et al. 2025, "GPTAQ: Efficient Finetuning-Free
Quantization for Asymmetric Calibration"; there the term is worked into GPTQ's updates).

>>> import torch
>>> true = torch.tensor([[1.0, 0.0], [0.0, 2.0]])    # two tokens of two inputs
>>> behind = true * torch.tensor([1.0, 0.5])         # the second input arrives halved
>>> hessian, drift = behind.T @ behind / 2, (true - behind).T @ behind / 2
>>> retarget(torch.ones(1, 2), hessian, drift, strength=1.0, damp=0.0).tolist()
[[1.0, 2.0]]
"""

import torch
from torch import Tensor

from bitwright.errors import NotPositiveDefinite
from bitwright.numerics.linalg import damped


def retarget(
    weight_OI: Tensor, hessian_II: Tensor, drift_II: Tensor, *, strength: float, damp: float = 0.05
) -> Tensor:
    """W + strength * W D (H + damping)⁻¹, a new tensor of the weight's dtype.

    ``hessian_II`` and ``drift_II``: float32, means over tokens of x~ x~ᵀ and (x - x~) x~ᵀ.
    ``strength``: 0 keeps the weights, 1 is the least-squares fit; less than 1 because the fit also
    learns the calibration text. ``damp``: fraction of the hessian's mean diagonal. Raises
    NotPositiveDefinite.
    """
    factor_II, failed = torch.linalg.cholesky_ex(damped(hessian_II, damp))
    if int(failed):
        raise NotPositiveDefinite("the damped hessian of the inputs has no Cholesky factor")
    fit_II = torch.cholesky_solve(drift_II.T, factor_II).T
    return weight_OI + strength * (weight_OI @ fit_II.to(weight_OI.dtype))
