"""Random layers with correlated inputs."""

import torch
from torch import Tensor

from bitwright.numerics.grids import IntGrid
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats


def layer(
    rows: int, cols: int, seed: int, *, dtype: torch.dtype = torch.float64, tokens: int = 0
) -> tuple[Tensor, InputStats]:
    """A weight and the statistics of inputs that move together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mixing = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    size = torch.rand(cols, generator=generator, dtype=torch.float64) + 0.2
    white = torch.randn(tokens or 4 * cols, cols, generator=generator, dtype=torch.float64)
    x = white @ (mixing + 0.3 * torch.eye(cols, dtype=torch.float64)) * size
    return weight.to(dtype), stats_of(x.to(dtype))


def stats_of(x_TI: Tensor) -> InputStats:
    """The statistics of given inputs."""
    return InputStats(x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), x_TI.abs().amax(0), len(x_TI))


def with_hessian(hessian_II: Tensor) -> InputStats:
    """Statistics that have only a hessian."""
    ones = torch.ones(len(hessian_II), dtype=hessian_II.dtype)
    return InputStats(hessian_II, ones, ones, 1)


def integer_spec(bits: int, size: int = -1, *, asymmetric: bool = False) -> Spec:
    """Integers in groups of ``size`` columns, scales kept in float32."""
    grid = IntGrid(bits, signed=not asymmetric)
    return Spec(grid, (1, size), scale=torch.float32, asymmetric=asymmetric)
