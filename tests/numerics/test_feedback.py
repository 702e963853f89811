"""Rounding with feedback: the written-out step, what it gains, and its limits."""

import pytest
import torch
from torch import Tensor

from bitwright.numerics import feedback as module
from bitwright.numerics.feedback import Feedback, feedback_codes, feedback_for
from bitwright.numerics.grids import E4M3, Grid, IntGrid
from bitwright.numerics.rounding import decode, encode

GRIDS = [E4M3, IntGrid(8), IntGrid(4)]


def problem(grid: Grid, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """(vectors, scales, gram of what they are multiplied with: a few directions and noise)."""
    x = torch.randn(200, width) * torch.linspace(0.3, 4, width)
    readers = torch.randn(500, 3) @ torch.randn(3, width) + 0.1 * torch.randn(500, width)
    scale = (x.abs().amax() / grid.largest).expand(x.shape)
    return x, scale, readers.T @ readers / 500


def lost(x: Tensor, codes: Tensor, scale: Tensor, grid: Grid, gram: Tensor) -> float:
    error = decode(codes, grid) * scale - x
    return float(((error @ gram) * error).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_lose_less_than_by_nearest_rounding(grid: Grid) -> None:
    x, scale, gram = problem(grid)
    found = feedback_codes(x, scale, None, feedback_for(gram, x.square().mean(0)), grid)
    nearest = encode(x / scale, grid)
    assert lost(x, found, scale, grid, gram) < 0.35 * lost(x, nearest, scale, grid, gram)
    identity = feedback_for(torch.eye(24), torch.ones(24))
    assert torch.equal(feedback_codes(x, scale, None, identity, grid), nearest)
    unread = feedback_for(torch.zeros(24, 24), torch.ones(24))
    assert torch.equal(feedback_codes(x, scale, None, unread, grid), nearest)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("grid", [*GRIDS, IntGrid(4, signed=False)], ids=str)
def test_the_loops_are_the_same_step(grid: Grid, zero: bool) -> None:
    if zero and not isinstance(grid, IntGrid):
        pytest.skip("floats have no zero points")
    x, scale, gram = problem(grid)
    feedback = feedback_for(gram, x.square().mean(0))
    zeros = torch.full_like(scale, 3.0) if zero else torch.zeros_like(scale)
    order = feedback.order_C
    rest = (feedback.upper_CC, scale[:, order], zeros[:, order], grid)
    compiled = module._compiled(x[:, order], *rest)
    plain = module._by_tensors(x[:, order], *rest)
    # Sums in another order may put a near tie elsewhere, from where that row goes its own way.
    assert int((compiled != plain).any(1).sum()) <= 4
    kept = feedback_codes(x, scale, zeros if zero else None, feedback, grid)
    assert torch.equal(kept[:, order], compiled)


def test_a_permutation_of_coordinates_permutes_the_codes() -> None:
    x, scale, gram = problem(E4M3)
    power = x.square().mean(0)
    shuffle = torch.randperm(24)
    found = feedback_codes(x, scale, None, feedback_for(gram, power), E4M3)
    moved = feedback_for(gram[shuffle][:, shuffle], power[shuffle])
    other = feedback_codes(x[:, shuffle], scale, None, moved, E4M3)
    assert int((other != found[:, shuffle]).any(1).sum()) <= 4


def test_vectors_do_not_depend_on_each_other() -> None:
    x, scale, gram = problem(E4M3)
    feedback = feedback_for(gram, x.square().mean(0))
    assert isinstance(feedback, Feedback)
    every = feedback_codes(x, scale, None, feedback, E4M3)
    assert torch.equal(feedback_codes(x[7:9], scale[7:9], None, feedback, E4M3), every[7:9])
