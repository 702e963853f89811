"""Rotations: equivalent weights whose inputs have no outlier channels.

A residual stream x may be replaced by x Q with Q orthonormal: what reads it becomes W Q, what
writes it Qᵀ W, because (x Q)(W Q)ᵀ = x Wᵀ and an RMS norm without a gain commutes with Q. A
Hadamard Q with random signs spreads every outlier over all channels, which is what makes 4-bit
activations possible. Names as in SpinQuant (Liu et al. 2024), idea and Hadamards as in QuaRot
(Ashkboos et al. 2024): R1 rotates the residual stream, R2 each head between v and o, R4 the
input of the down projection, at run time because a nonlinearity precedes it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import BadShape
from bitwright.numerics.hadamard import (
    has_hadamard,
    power_of_two_in,
    random_signs,
    times_hadamard,
)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Q = diag(sign) times a block-diagonal of H / sqrt(block); ``sign_I``: float, (I,)."""

    block: int
    sign_I: Tensor

    @property
    def width(self) -> int:
        """The order of Q."""
        return len(self.sign_I)


def full_or_blocks(width: int) -> int:
    """The order of the largest Hadamard block to rotate ``width`` channels with.

    The width itself where a Hadamard matrix of it can be built, else the largest power of two
    that divides it.
    """
    return width if has_hadamard(width) else power_of_two_in(width)


def residual_rotation(width: int, seed: int) -> Rotation:
    """R1: every channel with every other, where a Hadamard matrix of the width exists."""
    return Rotation(full_or_blocks(width), random_signs(width, seed))


def head_rotation(width: int, head: int, seed: int) -> Rotation:
    """R2: the same rotation in every head of ``head`` channels. Raises BadShape."""
    if head < 1 or width % head:
        raise BadShape(f"heads of {head} channels do not divide the width {width}")
    return Rotation(full_or_blocks(head), random_signs(head, seed).repeat(width // head))


def online_rotation(width: int, block: int) -> Rotation:
    """R4: a plain Hadamard, nothing to store but ``block``."""
    return Rotation(block, torch.ones(width, dtype=torch.float64))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x Q, in the dtype of ``x`` (..., I)."""
    return times_hadamard(x * rotation.sign_I.to(x), rotation.block)


def unrotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x Qᵀ, the inverse of `rotate`."""
    return times_hadamard(x, rotation.block, transposed=True) * rotation.sign_I.to(x)


def reading(weight_OI: Tensor, rotation: Rotation) -> Tensor:
    """The weight of a Linear whose input is rotated: W Q."""
    return rotate(weight_OI, rotation)


def writing(parameter: Tensor, rotation: Rotation) -> Tensor:
    """The weight (O, I) or bias (O,) of a Linear whose output is to be rotated: Qᵀ W, b Q."""
    return rotate(parameter.T, rotation).T if parameter.ndim == 2 else rotate(parameter, rotation)


def absorb_gain(weight_OI: Tensor, gain_I: Tensor) -> Tensor:
    """The weight of a Linear that reads a norm, with the norm's gain taken over: W diag(g)."""
    return weight_OI * gain_I
