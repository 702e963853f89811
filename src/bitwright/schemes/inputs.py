"""Rounding what a Linear receives, as a runtime with low-bit activations does."""

import torch
from torch import Tensor

from bitwright.numerics.grids import E2M1, E8M0, IntGrid
from bitwright.numerics.groups import expand, sides, split
from bitwright.numerics.rounding import nearest
from bitwright.numerics.scales import store_scale
from bitwright.numerics.straight_through import pass_through
from bitwright.schemes.scheme import Spec


def needs_calibrated_scale(spec: Spec) -> bool:
    """Whether a number from calibration is stored: static scales, and two-level ones."""
    return spec.mode == "static" or spec.two_level


def round_input(x: Tensor, spec: Spec, input_scale: Tensor | None = None) -> Tensor:
    """``x`` (..., I) rounded to the spec's grid and read back, in its own dtype.

    Dynamic scales are max|x| / `covered` of each token, group of a token or block,
    computed here, at storage precision; static ones are ``input_scale`` (1,), which for
    two-level specs is the global scale. Values beyond a static range saturate.
    """
    x_TI = x.reshape(-1, x.shape[-1]).float()
    if spec.mode == "static":
        assert input_scale is not None
        scale = input_scale.to(x_TI.device, torch.float32)
        return nearest(x_TI / scale, spec.grid).mul_(scale).view(x.shape).to(x.dtype)
    overall = None
    if spec.two_level:
        assert input_scale is not None
        overall = input_scale.to(x_TI.device, torch.float32)
        x_TI = x_TI / overall
    amax_TG = split(x_TI, spec.group).abs().amax(-1)
    scale_TG = store_scale(amax_TG / covered(spec), spec.scale)
    shape = (x_TI.shape[0], x_TI.shape[1])
    if sides(shape, spec.group) == (1, shape[1]):
        scale_TI = scale_TG
    else:
        scale_TI = expand(scale_TG, shape, spec.group)
    out = nearest(x_TI / scale_TI, spec.grid).mul_(scale_TI)
    if overall is not None:
        out *= overall
    return out.view(x.shape).to(x.dtype)


def straight_through_input(x: Tensor, spec: Spec, input_scale: Tensor | None = None) -> Tensor:
    """`round_input` with a gradient: one everywhere, zero where a static range clamps."""
    value = round_input(x.detach(), spec, input_scale)
    inside = None
    if spec.mode == "static" and x.requires_grad:
        assert input_scale is not None
        inside = x.detach().abs() <= input_scale.to(x.device) * spec.grid.largest
    return pass_through(x, value, inside)


def covered(spec: Spec) -> float:
    """What dynamic scaling maps the largest magnitude to; runtimes fix it, checkpoints do not.

    Integers of less than 8 bits: 2^(b-1) - 1/2, and E2M1 under a power of two: 7, which is 6
    rounded up where that spares doubling the step, both as compressed-tensors has them. INT8:
    127, as vLLM's kernels have it. Others: the largest value of the grid.
    """
    grid = spec.grid
    if grid == E2M1 and spec.scale == E8M0:
        return 7.0
    if isinstance(grid, IntGrid) and grid.bits < 8:
        return grid.highest + 0.5
    return grid.largest
