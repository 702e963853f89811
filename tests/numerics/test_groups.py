"""Granularities: shapes, counts, and split/join as inverses."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from bitwright.errors import BadShape
from bitwright.numerics.groups import (
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    Group,
    count_scales,
    dividing_sizes,
    expand,
    join,
    per_group,
    scale_shape,
    split,
)


@pytest.mark.parametrize(
    ("shape", "group", "scales", "count"),
    [
        ((96, 256), PER_TENSOR, (1, 1), 1),
        ((96, 256), PER_CHANNEL, (96, 1), 96),
        ((7, 256), PER_TOKEN, (7, 1), 7),
        ((96, 256), per_group(64), (96, 4), 96 * 256 // 64),
        ((96, 256), per_group(-1), (96, 1), 96),
        ((256, 384), (128, 128), (2, 3), 6),
        ((200, 300), (128, 128), (2, 3), 6),
    ],
)
def test_each_granularity_has_its_number_of_scales(
    shape: tuple[int, int], group: Group, scales: tuple[int, int], count: int
) -> None:
    assert scale_shape(shape, group) == scales
    assert count_scales(shape, group) == count


def test_a_group_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(BadShape, match=r"100 does not divide the input width 192.*64, 32, 16"):
        scale_shape((8, 192), per_group(100))


def test_dividing_sizes() -> None:
    assert dividing_sizes([256, 384]) == [128, 64, 32, 16]
    assert dividing_sizes([100]) == []


@st.composite
def shapes_and_groups(draw: st.DrawFn) -> tuple[tuple[int, int], Group]:
    shape = (draw(st.integers(1, 20)), draw(st.integers(1, 24)))
    rows = draw(st.sampled_from([-1, 1, 2, 3, 5, 8]))
    cols = draw(st.sampled_from([-1, 1, 2, 3, 4, 6, 8]))
    side = shape[1] if cols == -1 else cols
    one_row = rows == 1 or (rows == -1 and shape[0] == 1)
    assume(not one_row or shape[1] % side == 0)
    return shape, (rows, cols)


@given(shapes_and_groups())
def test_join_undoes_split(case: tuple[tuple[int, int], Group]) -> None:
    shape, group = case
    x = torch.arange(1.0, shape[0] * shape[1] + 1).reshape(shape)
    groups = split(x, group)
    assert groups.shape[:2] == scale_shape(shape, group)
    assert torch.equal(join(groups, shape, group), x)
    assert groups.sum() == x.sum()


@given(shapes_and_groups())
def test_expand_gives_every_value_the_scale_of_its_group(
    case: tuple[tuple[int, int], Group],
) -> None:
    shape, group = case
    r, g = scale_shape(shape, group)
    scale = torch.arange(1.0, r * g + 1).reshape(r, g)
    members = split(torch.ones(shape), group).shape[-1]
    expected = join(scale[..., None].expand(r, g, members), shape, group)
    assert torch.equal(expand(scale, shape, group), expected)
