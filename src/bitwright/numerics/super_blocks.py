"""Scales that are themselves quantized: whole multiples of one float16 unit per 256 weights.

GGUF's "K" types store, for a super-block of 256 neighbours in a row, one float16 unit and small
integers that multiply it: the scales of 8 groups of 32 (or 16 of 16), and likewise their offsets.
A weight is scale * code - offset. Choosing both integers and units is a search here, by the
squared error weighted with the importance of each column.
"""

import torch
from torch import Tensor

from bitwright.numerics.compiled_super import group_fits, stored_fits
from bitwright.numerics.grids import IntGrid

SUPER = 256
RATIOS = 24
ROUNDS = 2


def super_block_scales(
    weight_OI: Tensor,
    grid: IntGrid,
    group: int,
    factors: IntGrid,
    *,
    asymmetric: bool,
    importance_I: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(scale, offset), float32 (O, I / group); offset is None unless ``asymmetric``.

    ``weight_OI``: float, I a multiple of 256. ``factors``: the grid of the integers that multiply
    a unit. Scales are never 0 (and only negative where ``factors`` is signed).
    """
    device, (rows, cols) = weight_OI.device, weight_OI.shape
    x_SGC = weight_OI.detach().cpu().float().contiguous().view(-1, SUPER // group, group).numpy()
    weight = torch.ones(cols) if importance_I is None else importance_I.cpu().float()
    weight = weight / weight.mean().clamp(min=1e-30) + 1e-6  # no column is worth nothing
    weight_RGC = weight.contiguous().view(-1, SUPER // group, group).numpy()
    low, high = float(grid.lowest), float(grid.highest)
    ratio_K = torch.linspace(1.1, 0.5, RATIOS).numpy()
    scale_SG, offset_SG = group_fits(x_SGC, weight_RGC, ratio_K, low, high, asymmetric)
    largest, below = torch.from_numpy(scale_SG).abs().amax(1), torch.from_numpy(offset_SG).amax(1)
    last = factors.highest
    unit_SK = torch.stack([_half(largest / (last - k)) for k in (-1, 0, 1, 3)], 1)
    below_SK = torch.stack([_half(below / (last - k)) for k in (-1, 0, 1, 3)], 1)
    count = unit_SK.shape[1]
    pairs = [(i, j) for i in range(count) for j in range(count if asymmetric else 1)]
    unit_SK, below_SK = unit_SK[:, [i for i, _ in pairs]], below_SK[:, [j for _, j in pairs]]
    if not asymmetric:
        below_SK = torch.zeros_like(below_SK)
    first = max(factors.lowest, -last) if factors.signed else 1
    for _ in range(ROUNDS):
        found, offset, units_S2 = stored_fits(
            x_SGC, weight_RGC, scale_SG, offset_SG, unit_SK.numpy(), below_SK.numpy(),
            low, high, first, last, 1,
        )  # fmt: skip
        refit_S2 = torch.from_numpy(units_S2).float()
        unit_SK = torch.cat([unit_SK, _half(refit_S2[:, :1].abs())], 1)
        below_SK = torch.cat([below_SK, _half(refit_S2[:, 1:].clamp(min=0)) * asymmetric], 1)
    scale_OG = torch.from_numpy(found).view(rows, -1).to(device)
    return scale_OG, torch.from_numpy(offset).view(rows, -1).to(device) if asymmetric else None


def _half(unit: Tensor) -> Tensor:
    """Rounded to float16, as float32; a unit that would vanish becomes the smallest one."""
    return unit.clamp(2.0**-24, 65504.0).to(torch.float16).float()


def units_and_factors(value_SG: Tensor, factors: IntGrid) -> tuple[Tensor, Tensor]:
    """(float16 unit (S, 1), int64 factor (S, G)) with value = unit * factor exactly.

    Raises ValueError where there is none with all factors in the grid ``factors``.
    """
    largest = value_SG.abs().amax(1, keepdim=True)
    unit, missing = torch.zeros_like(largest), largest > 0
    for factor in range(max(factors.highest, -factors.lowest), 0, -1):
        for sign in (factor, -factor):
            candidate = (largest / sign).to(torch.float16).float()
            multiple = (value_SG / torch.where(candidate == 0, 1.0, candidate)).round()
            fits = (multiple * candidate == value_SG) & (multiple <= factors.highest)
            fits = (fits & (multiple >= factors.lowest)).all(1, keepdim=True) & missing
            unit, missing = torch.where(fits, candidate, unit), missing & ~fits
        if not bool(missing.any()):
            break
    if bool(missing.any()):
        raise ValueError("values are no whole multiples of float16 units")
    multiple = (value_SG / torch.where(unit == 0, 1.0, unit)).round()
    return unit.to(torch.float16), multiple.to(torch.int64)
