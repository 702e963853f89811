"""Hadamard matrices: exactly orthogonal, and applied fast as the matrix says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.errors import BadShape
from bitwright.numerics.hadamard import (
    hadamard,
    has_hadamard,
    power_of_two_in,
    random_signs,
    times_hadamard,
)

# widths of hidden states, MLPs and heads of released models, and every kind of construction:
# 28 = 3^3 + 1, 36 = 2 (17 + 1), 50 + 2 and 2 (5^2 + 1) = 52, 344 = 7^3 + 1
ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 52, 60, 64, 80, 96, 128, 148, 192, 344, 576, 896, 960)
MODEL_WIDTHS = (576, 768, 896, 960, 1024, 1152, 1536, 2048, 2304, 2560, 2816, 3072, 3584, 4096,
                4864, 5120, 5632, 6912, 8192, 8960, 9216, 9728, 11008, 13824, 14336, 18944, 27648,
                28672, 29568)  # fmt: skip


def in_float(n: int) -> torch.Tensor:
    return hadamard(n).to(torch.float64)


@pytest.mark.parametrize("n", [*ORDERS, 1536])
def test_rows_are_orthogonal_and_entries_are_signs(n: int) -> None:
    matrix = in_float(n)
    assert matrix.shape == (n, n)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", MODEL_WIDTHS)
def test_widths_of_known_models_have_one(n: int) -> None:
    """Too large to build here: rows of the identity show a few rows of the matrix."""
    assert has_hadamard(n)
    some = torch.zeros(4, n, dtype=torch.float64)
    some[torch.arange(4), torch.tensor([0, 1, n // 3, n - 1])] = 1
    rows = times_hadamard(some, n)
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, n**-0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64))


def test_every_multiple_of_four_up_to_88_has_one() -> None:
    """Sylvester and Paley reach all of them; 92 is the first they do not."""
    missing = [n for n in range(4, 93, 4) if not has_hadamard(n)]
    assert missing == [92]


@pytest.mark.parametrize("n", [0, 3, 6, 14, 92, 172])
def test_an_order_without_a_construction_is_refused_by_size(n: int) -> None:
    with pytest.raises(BadShape, match=rf"\b{n}\b.*power of two|does not divide"):
        hadamard(n)


@settings(max_examples=40, deadline=None)
@given(
    order=st.sampled_from([n for n in ORDERS if n <= 192]),
    blocks=st.integers(1, 3),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_fast_product_is_the_product(
    order: int, blocks: int, transposed: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, order * blocks, generator=generator, dtype=torch.float64)
    matrix = in_float(order) / order**0.5
    matrix = torch.block_diag(*[matrix.T if transposed else matrix] * blocks)
    torch.testing.assert_close(times_hadamard(x, order, transposed=transposed), x @ matrix)


def test_transposed_undoes_it() -> None:
    x = torch.randn(5, 344, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    there = times_hadamard(x, 344)
    assert float((there - x).norm() / x.norm()) > 0.5
    torch.testing.assert_close(times_hadamard(there, 344, transposed=True), x)


def test_a_power_of_two_is_the_matrix_of_compressed_tensors() -> None:
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix

    for n in (1, 2, 64, 512):
        theirs = deterministic_hadamard_matrix(n, torch.float64)
        assert torch.equal(in_float(n), theirs)


def test_a_block_must_divide_the_width() -> None:
    with pytest.raises(BadShape, match="64 does not divide the width 96"):
        times_hadamard(torch.ones(96), 64)


def test_power_of_two_in() -> None:
    assert [power_of_two_in(n) for n in (576, 1536, 11008, 7, 64)] == [64, 512, 256, 1, 64]


def test_signs_come_from_the_seed() -> None:
    signs = random_signs(1000, 3)
    assert torch.equal(signs, random_signs(1000, 3))
    assert not torch.equal(signs, random_signs(1000, 4))
    assert bool((signs.abs() == 1).all())
    assert abs(float(signs.mean())) < 0.15
