"""Rounding of inputs, against a plain computation with ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch

from bitwright.numerics.grids import E2M1, E4M3, E8M0, IntGrid
from bitwright.numerics.groups import PER_TENSOR, PER_TOKEN
from bitwright.schemes.inputs import needs_calibrated_scale, round_input
from bitwright.schemes.scheme import EXAMPLES, Spec, parse_scheme

TOKEN_FP8 = Spec(E4M3, PER_TOKEN, scale=torch.float32, mode="dynamic")
TENSOR_FP8 = Spec(E4M3, PER_TENSOR, scale=torch.float32)
X = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * 4


def test_fp8_per_token() -> None:
    scale = (X.abs().amax(-1, keepdim=True) / 448).numpy()
    expected = (X.numpy() / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(round_input(X, TOKEN_FP8).numpy(), expected)


def test_int8_per_token_reaches_127() -> None:
    spec = Spec(IntGrid(8), PER_TOKEN, scale=torch.float32, mode="dynamic")
    scale = X.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(round_input(X, spec), torch.round(X / scale) * scale)


def test_groups_of_a_token_have_their_own_scales() -> None:
    spec = Spec(E4M3, (1, 16), scale=torch.float32, mode="dynamic")
    parts = X.reshape(-1, 16)
    torch.testing.assert_close(round_input(X, spec).reshape(-1, 16), round_input(parts, TOKEN_FP8))


@pytest.mark.parametrize("spec", [TENSOR_FP8, Spec(IntGrid(8), PER_TENSOR, scale=torch.float32)])
def test_static_scales_saturate(spec: Spec) -> None:
    scale = torch.tensor([0.01])
    rounded = round_input(X, spec, scale)
    inside = X.abs() < 0.01 * spec.grid.largest
    assert float(rounded.max()) == pytest.approx(0.01 * spec.grid.largest)
    assert not bool(inside.all())
    error = (rounded - X)[inside].abs() / X[inside].abs().clamp(min=0.32)
    assert float(error.max()) <= 1 / 16


def test_two_level_blocks() -> None:
    spec = Spec(E2M1, (1, 16), scale=E4M3, two_level=True, mode="dynamic")
    overall = X.abs().amax() / (6 * 448)
    blocks = (X / overall).reshape(-1, 16)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
    levels = (blocks / scale).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = (torch.from_numpy(levels) * scale * overall).view_as(X)
    torch.testing.assert_close(round_input(X, spec, overall.reshape(1)), expected)


def test_power_of_two_blocks() -> None:
    spec = Spec(E2M1, (1, 32), scale=E8M0, mode="dynamic")
    rounded = round_input(X, spec).reshape(-1, 32)
    blocks = X.reshape(-1, 32)
    step = 2.0 ** torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / 7))
    levels = (blocks / step).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    assert torch.equal(rounded, torch.from_numpy(levels.astype(np.float32)) * step)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", EXAMPLES)
def test_shape_dtype_and_zero_tokens_are_kept(name: str, dtype: torch.dtype) -> None:
    spec = parse_scheme(name).input
    if spec is None:
        return
    x = X.to(dtype)
    x[0, 0] = 0
    scale = torch.ones(1) / 64 if needs_calibrated_scale(spec) else None
    rounded = round_input(x, spec, scale)
    assert (rounded.dtype, rounded.shape) == (dtype, x.shape)
    assert bool((rounded[0, 0] == 0).all())
    assert bool(torch.isfinite(rounded).all())
    torch.testing.assert_close(x, X.to(dtype).index_put((torch.tensor(0), torch.tensor(0)),
                                                        torch.zeros(64, dtype=dtype)))  # fmt: skip
