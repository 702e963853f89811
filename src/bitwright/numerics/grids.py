"""A grid is a finite set of real numbers, each with a code of at most eight bits.

Integers are stored offset-binary: code = integer - lowest, so an INT4 grid -8..7 has
codes 0..15 and code 8 is zero (the layout compressed-tensors and GPTQ put on disk).
Floats are stored as their own bit pattern.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats
(MX) Specification 1.0 (E2M1, E8M0).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class IntGrid:
    """Integers of ``bits`` bits: -2^(b-1)..2^(b-1)-1 if signed, else 0..2^b-1."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"integer grids have 2 to 8 bits, not {self.bits}")

    @property
    def lowest(self) -> int:
        """Smallest integer of the grid."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        """Largest integer of the grid."""
        return self.lowest + (1 << self.bits) - 1

    @property
    def largest(self) -> float:
        """The magnitude that absmax scaling maps the largest value to: 2^(b-1) - 1 if signed."""
        return float(self.highest)


@dataclass(frozen=True)
class FloatGrid:
    """Binary floats: sign | exponent | mantissa, with ``bias``.

    ``specials``: "ieee" (the top exponent holds infinities and NaN), "nan" (only the
    all-ones code is NaN), "none" (every code is a finite number).
    """

    exponent: int
    mantissa: int
    bias: int
    specials: Literal["ieee", "nan", "none"]
    signed: bool = True

    @property
    def bits(self) -> int:
        """Width of one code."""
        return int(self.signed) + self.exponent + self.mantissa

    @property
    def smallest_exponent(self) -> int:
        """Exponent of the smallest normal value, which subnormals share."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        """Largest finite value."""
        return float(finite_magnitudes(self)[-1])


Grid = IntGrid | FloatGrid

E4M3 = FloatGrid(4, 3, 7, "nan")
E5M2 = FloatGrid(5, 2, 15, "ieee")
E2M1 = FloatGrid(2, 1, 1, "none")
E8M0 = FloatGrid(8, 0, 127, "nan", signed=False)


@lru_cache(maxsize=32)
def values(grid: Grid) -> Tensor:
    """The value of every code, float64, shape (2^bits,); NaN and infinities included."""
    codes = torch.arange(1 << grid.bits, dtype=torch.int64)
    if isinstance(grid, IntGrid):
        return (codes + grid.lowest).to(torch.float64)
    magnitude_bits = grid.exponent + grid.mantissa
    magnitude = codes & ((1 << magnitude_bits) - 1)
    sign = 1.0 - 2.0 * (codes >> magnitude_bits).to(torch.float64)
    exponent = magnitude >> grid.mantissa
    fraction = (magnitude & ((1 << grid.mantissa) - 1)).to(torch.float64) / (1 << grid.mantissa)
    if grid.mantissa == 0:  # E8M0 is a pure power of two: no zero, no subnormals
        value = torch.pow(2.0, (exponent - grid.bias).to(torch.float64))
    else:
        normal = (1 + fraction) * torch.pow(2.0, (exponent - grid.bias).to(torch.float64))
        value = torch.where(exponent > 0, normal, fraction * 2.0 ** (1 - grid.bias))
    top = (1 << magnitude_bits) - 1
    if grid.specials == "nan":
        value = torch.where(magnitude == top, torch.nan, value)
    elif grid.specials == "ieee":
        special = torch.where(fraction == 0, torch.inf, torch.nan)
        value = torch.where(exponent == (1 << grid.exponent) - 1, special, value)
    return sign * value


@lru_cache(maxsize=32)
def finite_magnitudes(grid: FloatGrid) -> Tensor:
    """Non-negative finite values in ascending order (= ascending codes), float64."""
    positive = values(grid)[: 1 << (grid.exponent + grid.mantissa)]
    return positive[torch.isfinite(positive)]
