"""The inverse Cholesky factor against torch.linalg, and its refusal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import NotPositiveDefinite
from bitwright.numerics.linalg import damped, inverse_cholesky_upper


def _positive(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return x.T @ x / (3 * size) + 0.05 * torch.eye(size, dtype=torch.float64)


@given(size=st.integers(1, 40), seed=st.integers(0, 1000))
def test_factor_is_that_of_the_inverse(size: int, seed: int) -> None:
    matrix = _positive(size, seed)
    upper = inverse_cholesky_upper(matrix)
    expected = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    torch.testing.assert_close(upper, expected, rtol=1e-8, atol=1e-10)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(
        upper.T @ upper @ matrix, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("size", [128, 129, 515, 1100])
def test_large_factors_are_made_of_halves(size: int) -> None:
    matrix = _positive(size, size)
    upper = inverse_cholesky_upper(matrix)
    assert torch.equal(upper, upper.triu())
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ matrix, eye, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept_and_the_input_too(dtype: torch.dtype) -> None:
    matrix = _positive(6, 0).to(dtype)
    before = matrix.clone()
    assert inverse_cholesky_upper(matrix).dtype is dtype
    assert torch.equal(matrix, before)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.zeros(3, 3),
        -torch.eye(3),
        torch.ones(3, 3) - 2 * torch.eye(3),
        torch.full((2, 2), torch.nan),
    ],
    ids=["zero", "negative", "indefinite", "nan"],
)
def test_other_matrices_are_refused(matrix: torch.Tensor) -> None:
    with pytest.raises(NotPositiveDefinite, match="raise the damping"):
        inverse_cholesky_upper(matrix)


def test_damping_adds_a_fraction_of_the_mean_diagonal() -> None:
    matrix = torch.diag(torch.tensor([1.0, 3.0]))
    assert damped(matrix, 0.5).tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert matrix.tolist() == [[1.0, 0.0], [0.0, 3.0]]
