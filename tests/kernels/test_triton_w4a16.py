"""The Triton kernels through the interpreter, and compiled ahead of time for two GPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton_w4a16 = pytest.importorskip(
    "bitwright.kernels.triton_w4a16", reason="NOT TESTED: Triton is not installed"
)

from bitwright.kernels.layouts import pack_for_gpu, unpack_gpu, why_not_on_gpu  # noqa: E402
from bitwright.kernels.reference import linear, tolerance  # noqa: E402
from bitwright.methods.rtn import rtn  # noqa: E402
from bitwright.schemes.quantized import QuantizedLinear, dequantize  # noqa: E402
from bitwright.schemes.scheme import parse_scheme  # noqa: E402

RELATIVE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DRIVER = Path(__file__).parents[1] / "support" / "aot_driver.py"


def layer(rows: int, cols: int, size: int, *, asymmetric: bool, seed: int) -> QuantizedLinear:
    """A rounded random Linear with a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    scheme = parse_scheme("W4A16").with_weight(group_size=size, asymmetric=asymmetric)
    q = rtn(weight, None, scheme.weight, search="absmax")
    return replace(q, bias_O=torch.randn(rows, generator=generator))


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 150),
    groups=st.integers(1, 9),
    size=st.sampled_from([32, 64, 128, 256, -1]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from(list(RELATIVE)),
)
def test_products_are_the_specified_ones(
    tokens: int, rows: int, groups: int, size: int, asymmetric: bool, dtype: torch.dtype
) -> None:
    cols = groups * (size if size > 0 else 40)
    q = layer(rows, cols, size, asymmetric=asymmetric, seed=tokens)
    assert why_not_on_gpu(q) == ""
    x = torch.randn(tokens, cols).to(dtype)
    found, wanted = triton_w4a16.w4a16(x, pack_for_gpu(q)), linear(x, q)
    assert found.dtype == dtype
    assert ((found.float() - wanted.float()).abs() <= tolerance(x, q, RELATIVE[dtype])).all()


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_many_rows_expand_the_weight_once(size: int, asymmetric: bool) -> None:
    q = layer(70, 256, size, asymmetric=asymmetric, seed=1)
    w = pack_for_gpu(q)
    assert torch.equal(unpack_gpu(w), dequantize(q))
    expanded = triton_w4a16.expanded(w, torch.float16)
    assert torch.equal(expanded, dequantize(q, torch.float16))
    x = torch.randn(triton_w4a16.EXPANDED_FROM, 256).half()
    off = (triton_w4a16.w4a16(x, w).float() - linear(x, q).float()).abs()
    assert (off <= tolerance(x, q, 2e-3)).all()


def test_columns_are_split_until_the_device_is_full() -> None:
    assert triton_w4a16.split_of(programs=64, blocks=64, multiprocessors=132) == 5
    assert triton_w4a16.split_of(programs=1000, blocks=64, multiprocessors=132) == 1
    assert triton_w4a16.split_of(programs=1, blocks=3, multiprocessors=132) == 1


def test_groups_that_do_not_fit_say_why() -> None:
    assert "group size 96" in why_not_on_gpu(layer(8, 192, 96, asymmetric=False, seed=0))
    eight = rtn(torch.randn(8, 128), None, parse_scheme("W8A16").weight)
    assert "8 bits" in why_not_on_gpu(eight)


@pytest.mark.parametrize("scheme", ["NVFP4A16", "MXFP4"])
@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_four_bit_floats(scheme: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    for tokens, rows, cols in ((1, 7, 160), (19, 70, 256), (70, 33, 96)):
        weight = torch.randn(rows, cols, generator=generator)
        q = rtn(weight, None, parse_scheme(scheme).weight)
        w = pack_for_gpu(q)
        torch.testing.assert_close(unpack_gpu(w), dequantize(q), rtol=1e-6, atol=0)
        x = torch.randn(tokens, cols, generator=generator).to(dtype)
        off = (triton_w4a16.w4a16(x, w).float() - linear(x, q).float()).abs()
        assert (off <= tolerance(x, q, RELATIVE[dtype])).all()
        expanded = triton_w4a16.expanded(w, torch.float32)
        torch.testing.assert_close(expanded, dequantize(q), rtol=1e-6, atol=0)


def test_cubins_for_two_gpus_spill_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(DRIVER)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    assert {row["target"] for row in built} == {80, 90}
    assert len(built) >= 36
    for row in built:
        assert row["spill_bytes"] == 0, row
        assert row["registers"] <= 255, row
        assert row["shared_bytes"] <= 160 * 1024, row
    with capsys.disabled():
        worst = max(built, key=lambda row: row["registers"])
        print(f"\n{len(built)} cubins, no spills; most registers: {worst}")


def test_the_gpu_benchmark_runs_dry() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "bench_w4a16.py"
    done = subprocess.run(
        [sys.executable, str(script), "--dry"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("of the allowed error") == 12
    assert "nothing was timed" in done.stdout
