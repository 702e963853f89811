"""GPTQ: round one input column at a time and let the later columns absorb the error.

Objective: choose codes Q of a weight W so that trace((W - Q) H (W - Q)ᵀ) is small, H being the
mean over calibration tokens of x xᵀ. With H⁻¹ = Uᵀ U (U upper triangular) the optimal
response to fixing column i is, for every later column j,

    error_i = (w_i - q_i) / U[i, i]        w_j -= error_i * U[i, j]

because row i of U is, up to that factor, row i of the inverse of the part of H that is still
free (Frantar et al. 2023, "GPTQ", section 3.3; OBQ's downdate, done once for all rows).

Letters: O output rows, I input columns, G scale groups, B one lazy batch of columns.

>>> import torch
>>> from bitwright.schemes.scheme import Spec
>>> from bitwright.numerics.grids import IntGrid
>>> from bitwright.schemes.stats import InputStats
>>> from bitwright.schemes.quantized import dequantize
>>> hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])  # two inputs that nearly move together
>>> stats = InputStats(hessian, torch.ones(2), torch.ones(2), tokens=1)
>>> weight = torch.tensor([[1.0, 0.4]])               # INT2: scale 1, values -2..1
>>> spec = Spec(IntGrid(2), (1, 2), scale=torch.float32)
>>> q = gptq(weight, stats, spec, damp=0.0, order="natural", search="absmax")
>>> dequantize(q).tolist()
[[1.0, 0.0]]
>>> q = gptq(weight * torch.tensor([[1.0, 1.0]]) - 0.3, stats, spec, damp=0.0, search="absmax")
>>> dequantize(q).shape
torch.Size([1, 2])
"""

from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import BadShape
from bitwright.methods.rtn import choose_scales, without_global_scale
from bitwright.numerics.columns import solve_batch
from bitwright.numerics.groups import expand, scale_shape, sides
from bitwright.numerics.linalg import damped, inverse_cholesky_upper, without_dead
from bitwright.numerics.rounding import encode
from bitwright.numerics.scales import Search
from bitwright.schemes.quantized import QuantizedLinear, assemble
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

Order = Literal["activation", "natural"]


def gptq(
    weight_OI: Tensor,
    stats: InputStats,
    spec: Spec,
    *,
    damp: float = 0.01,
    lazy: int = 128,
    order: Order = "activation",
    search: Search = "mse",
    scale_RG: Tensor | None = None,
) -> QuantizedLinear:
    """Codes for one Linear; inputs are left unmodified.

    ``weight_OI``: float32 or float64 (O, I), the dtype everything is computed in.
    ``damp``: fraction of the hessian's mean diagonal added to its diagonal.
    ``lazy``: columns that take in the errors of all earlier ones together; the codes do not
    depend on it (it is one group where scales are taken from updated weights).
    ``order``: "activation" visits columns by falling mean square of their input, with group
    scales fixed beforehand from the original weights; "natural" goes left to right and takes
    each group's scale from the weights as updated so far.
    ``scale_RG``: scales chosen elsewhere, float, for specs without zero points.

    Raises NotPositiveDefinite if the damped hessian has no Cholesky factor, BadShape if the
    group size does not divide I or rows share scales.
    """
    if spec.group[0] != 1 and spec.group != (-1, -1):
        raise BadShape("gptq solves rows independently: scales may not be 2-D blocks")
    hessian_II, weight_OI, dead_I = without_dead(stats.hessian_II.to(weight_OI.dtype), weight_OI)
    weight_OI, global_scale = without_global_scale(weight_OI, spec)
    importance_I = hessian_II.diagonal().clone()
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    width = sides(shape, spec.group)[1]
    fixed = order == "activation" or spec.group[1] == -1 or scale_RG is not None
    if order == "activation":
        columns = torch.argsort(importance_I, descending=True, stable=True)
    else:
        columns = torch.arange(shape[1], device=weight_OI.device)
    zero_RG = None
    if scale_RG is None:
        scale_RG, zero_RG = choose_scales(weight_OI, spec, search=search, importance_I=importance_I)
    upper_II = inverse_cholesky_upper(
        damped(hessian_II, damp).index_select(0, columns).index_select(1, columns)
    )
    work_OI = weight_OI.index_select(1, columns)  # visited columns are replaced by their errors
    codes_OI = torch.empty(shape, dtype=torch.uint8, device=weight_OI.device)
    step = lazy if fixed else width
    for left in range(0, shape[1], step):
        batch = slice(left, left + step)
        work_OI[:, batch] -= work_OI[:, :left] @ upper_II[:left, batch]
        if not fixed:
            _rescale(work_OI[:, batch], scale_RG, zero_RG, importance_I, spec, search, left // step)
        codes_OB, work_OI[:, batch] = solve_batch(
            work_OI[:, batch],
            upper_II[batch, batch],
            _at(scale_RG, shape, spec, columns[batch]),
            None if zero_RG is None else _at(zero_RG, shape, spec, columns[batch]),
            spec.grid,
        )
        codes_OI.index_copy_(1, columns[batch], codes_OB)
    if bool(dead_I.any()):
        codes_OI[:, dead_I] = _zero_codes(scale_RG, zero_RG, shape, spec)[:, dead_I]
    return assemble(codes_OI, spec, scale_RG, zero_RG, global_scale)


def _rescale(
    work_OC: Tensor,
    scale_RG: Tensor,
    zero_RG: Tensor | None,
    importance_I: Tensor,
    spec: Spec,
    search: Search,
    group: int,
) -> None:
    """Choose one group's scales anew, from its weights as they are now."""
    width = work_OC.shape[1]
    importance_C = importance_I[group * width : (group + 1) * width]
    scale, zero = choose_scales(work_OC, spec, search=search, importance_I=importance_C)
    scale_RG[:, group : group + 1] = scale
    if zero_RG is not None and zero is not None:
        zero_RG[:, group : group + 1] = zero


def _at(value_RG: Tensor, shape: tuple[int, int], spec: Spec, columns: Tensor) -> Tensor:
    """Per-group values as one per weight, for the given columns."""
    width = sides(shape, spec.group)[1]
    return value_RG.index_select(1, columns // width).expand(shape[0], -1)


def _zero_codes(
    scale_RG: Tensor, zero_RG: Tensor | None, shape: tuple[int, int], spec: Spec
) -> Tensor:
    zeros = scale_RG.new_zeros(shape)
    if zero_RG is not None:
        zeros = zeros + expand(zero_RG, shape, spec.group)
    assert scale_RG.shape == scale_shape(shape, spec.group)
    return encode(zeros, spec.grid)
