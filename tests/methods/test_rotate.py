"""Rotations: orthonormal, undone by their inverse, and exact on both sides of a Linear."""

import pytest
import torch
from torch import Tensor

from bitwright.errors import BadShape
from bitwright.methods.rotate import (
    Rotation,
    absorb_gain,
    full_or_blocks,
    head_rotation,
    online_rotation,
    reading,
    residual_rotation,
    rotate,
    unrotate,
    writing,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


ROTATIONS = {
    "r1": residual_rotation(96, 0),
    "r1-in-blocks": residual_rotation(92 * 8 // 4, 0),
    "r2": head_rotation(96, 24, 1),
    "r4": online_rotation(96, 32),
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_q_is_orthonormal_and_unrotate_undoes_it(name: str) -> None:
    rotation = ROTATIONS[name]
    identity = torch.eye(rotation.width, dtype=torch.float64)
    q = rotate(identity, rotation)
    torch.testing.assert_close(q @ q.T, identity)
    x = random(3, rotation.width)
    torch.testing.assert_close(rotate(x, rotation), x @ q)
    torch.testing.assert_close(unrotate(rotate(x, rotation), rotation), x)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_linear_reads_and_writes_in_another_basis(name: str) -> None:
    rotation = ROTATIONS[name]
    x, bias = random(5, rotation.width), random(rotation.width, seed=2)
    weight = random(rotation.width, rotation.width, seed=1)
    expected = x @ weight.T + bias
    read = rotate(x, rotation) @ reading(weight, rotation).T + bias
    torch.testing.assert_close(read, expected)
    written = x @ writing(weight, rotation).T + writing(bias, rotation)
    torch.testing.assert_close(written, rotate(expected, rotation))


def test_rms_norm_commutes_with_a_rotation_once_its_gain_is_absorbed() -> None:
    rotation, gain = ROTATIONS["r1"], random(96, seed=3)
    x, weight = random(7, 96) * 5, random(10, 96, seed=1)

    def norm(value: Tensor) -> Tensor:
        return value / value.square().mean(-1, keepdim=True).sqrt()

    expected = (norm(x) * gain) @ weight.T
    turned = reading(absorb_gain(weight, gain), rotation)
    torch.testing.assert_close(norm(rotate(x, rotation)) @ turned.T, expected)


def test_an_outlier_channel_is_spread_over_all_of_them() -> None:
    x = random(64, 96)
    x[:, 7] *= 100
    rotated = rotate(x, ROTATIONS["r1"])
    peak = rotated.abs().amax(-1) / rotated.square().mean(-1).sqrt()
    assert float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).median()) > 9
    assert float(peak.median()) < 1.5


def test_every_head_turns_alike_and_alone() -> None:
    q = rotate(torch.eye(96, dtype=torch.float64), head_rotation(96, 24, 1)).view(4, 24, 4, 24)
    for i in range(4):
        for j in range(4):
            block = q[i, :, j]
            assert torch.equal(block, q[0, :, 0] if i == j else torch.zeros_like(block))


def test_wide_and_narrow_parts_of_one_head_layout_agree() -> None:
    """Grouped-query attention: fewer value heads than query heads."""
    few, many = head_rotation(32, 16, 1), head_rotation(64, 16, 1)
    assert torch.equal(few.sign_I.repeat(2), many.sign_I)


def test_a_width_without_a_hadamard_matrix_is_rotated_in_blocks() -> None:
    assert (full_or_blocks(576), full_or_blocks(92), full_or_blocks(1536)) == (576, 4, 1536)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(BadShape, match="heads of 20 channels do not divide the width 64"):
        head_rotation(64, 20, 0)


def test_the_seed_decides() -> None:
    x = random(2, 64)
    assert torch.equal(rotate(x, residual_rotation(64, 1)), rotate(x, residual_rotation(64, 1)))
    assert not torch.equal(rotate(x, residual_rotation(64, 1)), rotate(x, residual_rotation(64, 2)))


def test_dtypes_are_kept() -> None:
    rotation = Rotation(32, torch.ones(32))
    assert rotate(torch.ones(2, 32, dtype=torch.bfloat16), rotation).dtype is torch.bfloat16
