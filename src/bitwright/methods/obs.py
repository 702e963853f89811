"""Optimal Brain Surgeon: remove weights, let the remaining ones make up for it.

The error of a row w of a Linear is (v - w)ᵀ H (v - w) for the row v put in its place, H being
the mean of x xᵀ. The best v with v_q = 0 and the rise of half that error are

    v = w - w_q / [H⁻¹]_qq * H⁻¹[:, q]        w_q² / (2 [H⁻¹]_qq)

(Hassibi & Stork 1993, "Second order derivatives for network pruning", equations 5). To go on
without disturbing v_q, row and column q are eliminated from H⁻¹, which leaves the inverse of H
without q (Frantar & Alistarh 2022, "Optimal Brain Compression", lemma 1).

Letters: O output rows, I input columns. float32 or float64.

>>> import torch
>>> hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that nearly move together
>>> weight = torch.tensor([1.0, 0.4])
>>> inverse = torch.linalg.inv(hessian)
>>> [round(x, 4) for x in saliency(weight, inverse).tolist()]
[0.095, 0.0152]
>>> remove(weight, inverse, 1)                        # the first takes over 0.9 of the second
tensor([1.3600, 0.0000])
"""

import torch
from torch import Tensor

from bitwright.errors import BadRequest, BadShape, NotPositiveDefinite
from bitwright.numerics.linalg import damped, inverse_cholesky_upper, without_dead
from bitwright.schemes.stats import InputStats


def saliency(weight: Tensor, inverse_II: Tensor) -> Tensor:
    """w² / (2 [H⁻¹]_ii), the least rise of half the error if a weight is removed.

    ``weight``: (I,) or (O, I); the answer has its shape and dtype. A weight eliminated by
    `downdate` gets infinity. Raises BadShape if the sizes disagree.
    """
    _check(weight, inverse_II)
    diagonal_I = inverse_II.diagonal()
    removed = torch.full_like(weight, torch.inf)
    return torch.where(diagonal_I > 0, weight.square() / (2 * diagonal_I), removed)


def remove(weight: Tensor, inverse_II: Tensor, index: int | Tensor) -> Tensor:
    """``weight`` with one weight per row removed and the rest of the row optimally updated.

    ``weight``: (I,) or (O, I), each row on its own. ``index``: the column, or for (O, I) int64 (O,)
    with one column per row. Weights that `downdate` eliminated do not move. Inputs are kept.
    Raises BadShape if the sizes disagree, NotPositiveDefinite if [H⁻¹]_qq is not positive.

    >>> remove(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.eye(2), torch.tensor([0, 1])).tolist()
    [[0.0, 2.0], [3.0, 0.0]]
    """
    _check(weight, inverse_II)
    rows_OI = weight.reshape(-1, weight.shape[-1])
    index_O = torch.as_tensor(index, device=weight.device).expand(rows_OI.shape[0])[:, None]
    pivot_O1 = inverse_II.diagonal()[index_O]
    if not bool((pivot_O1 > 0).all()):
        raise NotPositiveDefinite("the weight to remove has no positive entry in the inverse")
    change_O1 = rows_OI.gather(1, index_O) / pivot_O1
    out_OI = rows_OI - change_O1 * inverse_II[index_O[:, 0]]
    return out_OI.scatter_(1, index_O, 0.0).reshape(weight.shape)


def downdate(inverse_II: Tensor, index: int) -> Tensor:
    """The inverse of H without row and column ``index``, in place; those two become zero.

    One step of Gaussian elimination; the input is kept. Raises NotPositiveDefinite if the
    pivot is not positive.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> downdate(torch.linalg.inv(hessian), 0).round(decimals=6).tolist()
    [[0.0, 0.0], [0.0, 0.5]]
    """
    row_I = inverse_II[index]
    if not bool(row_I[index] > 0):
        raise NotPositiveDefinite(f"pivot {index} of the inverse hessian is not positive")
    out_II = inverse_II - torch.outer(row_I / row_I[index], row_I)
    out_II[index, :] = 0
    out_II[:, index] = 0
    return out_II


def prune(
    weight_OI: Tensor,
    stats: InputStats,
    *,
    count: int | None = None,
    sparsity: float | None = None,
    damp: float = 0.01,
) -> Tensor:
    """``weight`` with ``count`` zeros in every row, or ``sparsity`` (0..1) of each row.

    Row by row: remove the weight of least saliency, update the rest, eliminate it from the
    inverse, repeat. Weights that are zero already, and those of dead inputs, count and go first.
    Computed in float64 (the downdate cancels), returned in the dtype of ``weight_OI``; inputs are
    kept. Each removal costs I² operations per row.

    Raises BadRequest unless exactly one of ``count`` and ``sparsity`` is given and lies in its
    range, BadShape if the sizes disagree, NotPositiveDefinite if the damped hessian has no
    Cholesky factor.

    >>> hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> stats = InputStats(hessian, torch.ones(2), torch.ones(2), tokens=1)
    >>> prune(torch.tensor([[1.0, 0.4], [0.1, 2.0]]), stats, count=1, damp=0.0)
    tensor([[1.3600, 0.0000],
            [0.0000, 2.0900]])
    """
    width = weight_OI.shape[-1]
    if (count is None) == (sparsity is None):
        raise BadRequest("give prune either a count of zeros per row or a sparsity, not both")
    zeros = round((sparsity or 0.0) * width) if count is None else count
    if not 0 <= zeros <= width:
        raise BadRequest(f"cannot make {zeros} of {width} weights per row zero")
    _check(weight_OI, stats.hessian_II)
    hessian_II, work_OI, _ = without_dead(stats.hessian_II.double(), weight_OI.double())
    upper_II = inverse_cholesky_upper(damped(hessian_II, damp))
    start_II = upper_II.T @ upper_II
    out_OI = torch.empty_like(work_OI)
    for o, weight_I in enumerate(work_OI):
        inverse_II = start_II
        for _ in range(zeros):
            index = int(saliency(weight_I, inverse_II).argmin())
            weight_I = remove(weight_I, inverse_II, index)
            inverse_II = downdate(inverse_II, index)
        out_OI[o] = weight_I
    return out_OI.to(weight_OI.dtype)


def _check(weight: Tensor, matrix_II: Tensor) -> None:
    width = weight.shape[-1]
    if weight.ndim not in (1, 2) or tuple(matrix_II.shape) != (width, width):
        raise BadShape(
            f"weight {tuple(weight.shape)} needs a matrix of side {width}, "
            f"not {tuple(matrix_II.shape)}"
        )
