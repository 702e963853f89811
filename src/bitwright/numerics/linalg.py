"""The one factorization second-order methods need."""

import torch
from torch import Tensor

from bitwright.errors import NotPositiveDefinite


def damped(hessian_II: Tensor, damp: float) -> Tensor:
    """``hessian`` plus ``damp`` times its mean diagonal on the diagonal; the input is kept."""
    out = hessian_II.clone()
    out.diagonal().add_(damp * out.diagonal().mean())
    return out


def without_dead(hessian_II: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hessian, weight, dead): inputs that were always zero get zero weights, others are kept.

    ``dead``: bool (I,). A dead input's diagonal becomes the mean one, so that the hessian can be
    factored. The arguments are left unmodified.
    """
    dead_I = hessian_II.diagonal() == 0
    if bool(dead_I.any()):
        hessian_II, weight_OI = hessian_II.clone(), weight_OI.clone()
        hessian_II[dead_I, dead_I] = hessian_II.diagonal().mean().clamp(min=1e-8)
        weight_OI[:, dead_I] = 0
    return hessian_II, weight_OI, dead_I


def inverse_cholesky_upper(matrix_II: Tensor) -> Tensor:
    """Upper U with inverse(matrix) = Uᵀ U, float32 or float64 as given.

    Row i of U, divided by U[i, i], is how the remaining weights move when weight i is fixed
    (Frantar et al. 2023, section 3.3). It equals inverse(L)ᵀ flipped, where L is the Cholesky
    factor of the matrix with its axes reversed, so the inverse itself is never formed.

    Raises NotPositiveDefinite; it never falls back.
    """
    lower, info = torch.linalg.cholesky_ex(matrix_II.flip(0, 1))
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        raise NotPositiveDefinite(
            f"the hessian of size {matrix_II.shape[0]} is not positive definite: "
            "raise the damping or give more calibration tokens"
        )
    return _lower_inverse(lower).flip(0, 1)


def _lower_inverse(lower_II: Tensor, leaf: int = 128) -> Tensor:
    """Inverse of a lower triangular matrix by halves, at about n³/3 multiplications and additions.

    Products leave out the halves that are zero; solving for eye would take three times as long.
    """
    size = len(lower_II)
    if size <= leaf:
        identity = torch.eye(size, dtype=lower_II.dtype, device=lower_II.device)
        inverse: Tensor = torch.linalg.solve_triangular(lower_II, identity, upper=False)
        return inverse
    half = size // 2
    out = torch.zeros_like(lower_II)
    out[:half, :half] = _lower_inverse(lower_II[:half, :half], leaf)
    out[half:, half:] = _lower_inverse(lower_II[half:, half:], leaf)
    middle = _times_lower(lower_II[half:, :half], out[:half, :half])
    out[half:, :half] = _lower_times(out[half:, half:], middle).neg_()
    return out


def _times_lower(a_NI: Tensor, lower_II: Tensor, leaf: int = 256) -> Tensor:
    """A L without the products with L's upper half."""
    if len(lower_II) <= leaf:
        return a_NI @ lower_II
    half = len(lower_II) // 2
    left = _times_lower(a_NI[:, :half], lower_II[:half, :half])
    left.addmm_(a_NI[:, half:], lower_II[half:, :half])
    return torch.cat([left, _times_lower(a_NI[:, half:], lower_II[half:, half:])], 1)


def _lower_times(lower_II: Tensor, b_IN: Tensor, leaf: int = 256) -> Tensor:
    """L B without the products with L's upper half."""
    if len(lower_II) <= leaf:
        return lower_II @ b_IN
    half = len(lower_II) // 2
    below = _lower_times(lower_II[half:, half:], b_IN[half:])
    below.addmm_(lower_II[half:, :half], b_IN[:half])
    return torch.cat([_lower_times(lower_II[:half, :half], b_IN[:half]), below])
