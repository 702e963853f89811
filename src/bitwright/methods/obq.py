"""Optimal Brain Quantization: each row fixes its cheapest weight next, the others absorb it.

Objective: as in `gptq`, trace((W - Q) H (W - Q)ᵀ). Every row keeps the inverse P of the part of
H that is still free and repeats

    i = argmin error_i² / P[i, i]        error_i = w_i - nearest grid value
    w -= error_i / P[i, i] * P[:, i]     P -= P[:, i] P[i, :] / P[i, i]

which is Optimal Brain Surgeon with "becomes its nearest grid value" for "becomes zero"
(Frantar & Alistarh 2022, "Optimal Brain Compression", section 5). A weight that the updates push
off the grid is fixed at once, the paper's rule for outliers. GPTQ is this with one order for all
rows, hence one P.

The cheapest weight first is the paper's order, and the better one while all inputs have about the
same size. It spends the freedom of the cheap directions before the dear ones are fixed, so with
inputs of unlike size or strongly correlated ones it loses to gptq's falling activations.
``order="pivot"`` fixes the weight of least P[i, i], the dearest, first; measured in
docs/methods-obs.md.

Cost: I³ / 6 multiplications per row, against I² / 2 for gptq.
"""

from typing import Literal

import torch
from torch import Tensor

from bitwright.errors import BadShape, NotPositiveDefinite
from bitwright.methods.rtn import choose_scales
from bitwright.numerics.compiled_obq import solve_rows
from bitwright.numerics.grids import Grid, IntGrid, finite_magnitudes
from bitwright.numerics.groups import expand
from bitwright.numerics.linalg import damped, inverse_cholesky_upper, without_dead
from bitwright.numerics.rounding import encode
from bitwright.numerics.scales import Search
from bitwright.schemes.quantized import QuantizedLinear, assemble
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

Order = Literal["error", "pivot"]

HALF_STEP = 0.501  # a hair over one half: rounding alone must not make an outlier


def obq(
    weight_OI: Tensor,
    stats: InputStats,
    spec: Spec,
    *,
    damp: float = 0.01,
    search: Search = "mse",
    order: Order = "error",
    outliers: bool = True,
) -> QuantizedLinear:
    """Codes for one Linear; inputs are left unmodified.

    ``weight_OI``: float32 or float64 (O, I). Weights and scales are computed in its dtype, the
    inverse in float64, because its downdate cancels. ``damp``: fraction of the hessian's mean
    diagonal added to its diagonal. Scales are fixed beforehand from the original weights, as in
    gptq's order "activation"; the weights of inputs that were always zero become zero. ``order``:
    next is the least error² / P[i, i] ("error", the paper) or the least P[i, i] ("pivot").
    ``outliers``: weights more than half a step off the grid come before all others.

    Raises NotPositiveDefinite if the damped hessian has no Cholesky factor or is so close to
    singular that a pivot vanishes, BadShape if the group size does not divide I, rows share
    scales, or the hessian is not (I, I).

    >>> from bitwright.schemes.quantized import dequantize
    >>> hessian = torch.eye(3)
    >>> hessian[1, 2] = hessian[2, 1] = 0.9  # the last two inputs nearly move together
    >>> stats = InputStats(hessian, torch.ones(3), torch.ones(3), tokens=1)
    >>> spec = Spec(IntGrid(2), (1, 3), scale=torch.float32)  # scale 1, values -2..1
    >>> q = obq(torch.tensor([[1.0, 0.4, 0.45]]), stats, spec, damp=0.0, search="absmax")
    >>> dequantize(q).tolist()  # 0.4 becomes 0 and leaves 0.45 + 0.9 * 0.4 to the last
    [[1.0, 0.0, 1.0]]
    """
    if spec.group[0] != 1 and spec.group != (-1, -1):
        raise BadShape("obq solves rows independently: scales may not be 2-D blocks")
    if tuple(stats.hessian_II.shape) != (weight_OI.shape[1], weight_OI.shape[1]):
        raise BadShape(
            f"a hessian of {tuple(stats.hessian_II.shape)} for {weight_OI.shape[1]} inputs"
        )
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    hessian_II, weight_OI, _ = without_dead(stats.hessian_II.to(weight_OI.dtype), weight_OI)
    scale_RG, zero_RG = choose_scales(
        weight_OI, spec, search=search, importance_I=hessian_II.diagonal()
    )
    upper_II = inverse_cholesky_upper(damped(hessian_II.double(), damp))
    scale_OI = expand(scale_RG, shape, spec.group)
    zero_OI = None if zero_RG is None else expand(zero_RG, shape, spec.group)
    level_OI, _ = solve(
        weight_OI, upper_II.T @ upper_II, scale_OI, zero_OI, spec.grid, order, outliers
    )
    if not bool(torch.isfinite(level_OI).all()):
        raise NotPositiveDefinite(
            f"the hessian of size {shape[1]} is too close to singular for an exact downdate: "
            "raise the damping"
        )
    return assemble(encode(level_OI, spec.grid), spec, scale_RG, zero_RG)


def solve(
    weight_OI: Tensor,
    inverse_II: Tensor,
    scale_OI: Tensor,
    zero_OI: Tensor | None,
    grid: Grid,
    order: Order = "error",
    outliers: bool = True,
    steps: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The first ``steps`` fixed weights of every row (default: all): (levels, weights).

    ``weight``, ``scale`` and ``zero``: one dtype, float32 or float64; ``inverse_II``: float64, of
    the damped hessian. Levels are grid values, NaN where a weight is still free or the row's
    pivot vanished; weights are the row as updated so far. Inputs are kept.
    """
    work_OI = weight_OI.detach().cpu().contiguous().clone()
    zero_OI = torch.zeros_like(work_OI) if zero_OI is None else zero_OI
    empty = torch.empty(0, dtype=work_OI.dtype)
    if isinstance(grid, IntGrid):
        bounds, step = (float(grid.lowest), float(grid.highest)), 1.0
        table = middles = empty
    else:
        bounds = (-grid.largest if grid.signed else 0.0, grid.largest)
        magnitudes = finite_magnitudes(grid)
        step = float(magnitudes[-1] - magnitudes[-2])  # the widest one
        table = magnitudes.to(work_OI.dtype)
        middles = ((magnitudes[1:] + magnitudes[:-1]) / 2).to(work_OI.dtype)
    level_OI = solve_rows(
        work_OI.numpy(),
        inverse_II.cpu().contiguous().numpy(),
        scale_OI.cpu().contiguous().numpy(),
        zero_OI.cpu().contiguous().numpy(),
        *bounds,
        table.numpy(),
        middles.numpy(),
        HALF_STEP * step if outliers else float("inf"),
        order == "error",
        work_OI.shape[1] if steps is None else steps,
    )
    return torch.from_numpy(level_OI).to(weight_OI.device), work_OI.to(weight_OI.device)
