"""The Triton kernels through the interpreter, and compiled ahead of time for GPUs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
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
from bitwright.numerics.grids import E2M1, values  # noqa: E402
from bitwright.schemes.quantized import QuantizedLinear, dequantize  # noqa: E402
from bitwright.schemes.scheme import parse_scheme  # noqa: E402

RELATIVE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
DRIVER = Path(__file__).parents[1] / "support" / "aot_driver.py"


def layer(
    rows: int, cols: int, size: int, *, asymmetric: bool, seed: int, bits: int = 4
) -> QuantizedLinear:
    """A rounded random Linear with a bias."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    scheme = parse_scheme(f"W{bits}A16").with_weight(group_size=size, asymmetric=asymmetric)
    q = rtn(weight, None, scheme.weight, search="absmax")
    return replace(q, bias_O=torch.randn(rows, generator=generator))


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 70),
    rows=st.integers(1, 150),
    groups=st.integers(1, 9),
    size=st.sampled_from([32, 64, 128, 256, -1]),
    asymmetric=st.booleans(),
    bits=st.sampled_from([4, 4, 8]),
    dtype=st.sampled_from(list(RELATIVE)),
)
def test_products_are_the_specified_ones(
    tokens: int, rows: int, groups: int, size: int, asymmetric: bool, bits: int, dtype: torch.dtype
) -> None:
    cols = groups * (size if size > 0 else 40)
    q = layer(rows, cols, size, asymmetric=asymmetric, seed=tokens, bits=bits)
    assert why_not_on_gpu(q) == ""
    x, w = torch.randn(tokens, cols).to(dtype), pack_for_gpu(q)
    found, wanted = triton_w4a16.w4a16(x, w), linear(x, q)
    assert found.dtype == dtype
    assert ((found.float() - wanted.float()).abs() <= tolerance(x, q, RELATIVE[dtype])).all()
    assert not w.locks.any()


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


def test_shared_columns_are_added_in_one_order() -> None:
    q = layer(40, 1152, 128, asymmetric=True, seed=3)  # nine blocks: shares of five and of four
    w = pack_for_gpu(q)
    assert triton_w4a16.share_of(tiles=1, w=w, multiprocessors=8) == 5
    x = torch.randn(3, 1152).half()
    first = triton_w4a16.w4a16(x, w)
    assert ((first.float() - linear(x, q).float()).abs() <= tolerance(x, q, 1e-3)).all()
    assert torch.equal(first, triton_w4a16.w4a16(x, w))
    assert not w.locks.any()


def test_columns_are_split_until_the_device_is_full() -> None:
    w = pack_for_gpu(layer(8, 8192, 128, asymmetric=False, seed=0))
    assert triton_w4a16.share_of(tiles=64, w=w, multiprocessors=132) == 13  # five programs each
    assert triton_w4a16.share_of(tiles=1000, w=w, multiprocessors=132) == 64
    assert triton_w4a16.share_of(tiles=1, w=w, multiprocessors=132) == 4
    assert triton_w4a16.share_of(tiles=5000, w=w, multiprocessors=9999) == 64  # no counter left


def test_columns_of_one_group_need_not_be_neighbours() -> None:
    q = layer(24, 128, 32, asymmetric=False, seed=1)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    shuffled = replace(
        q, codes_OI=q.codes_OI[:, order], group_of_column_I=(torch.arange(128) // 32)[order]
    )
    x = torch.randn(5, 128).half()
    off = (triton_w4a16.w4a16(x, pack_for_gpu(shuffled)).float() - linear(x, shuffled)).abs()
    assert (off <= tolerance(x, shuffled, 1e-3)).all()


def test_groups_that_do_not_fit_say_why() -> None:
    assert "group size 96" in why_not_on_gpu(layer(8, 192, 96, asymmetric=False, seed=0))
    q = layer(8, 192, 96, asymmetric=False, seed=0, bits=8)
    assert "multiple of 64" in why_not_on_gpu(q)


def execute(assembly: str, word: int, other: int) -> int:
    """What a few instructions on 32-bit registers leave in $0."""
    registers = {"$1": word, "$2": other}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(value: int, bfloat: bool) -> np.ndarray:
        low, high = value & 0xFFFF, value >> 16
        if bfloat:
            return np.array([low << 16, high << 16], dtype=np.uint32).view(np.float32)
        return np.array([low, high], dtype=np.uint16).view(np.float16).astype(np.float32)

    def joined(pair: np.ndarray, bfloat: bool) -> int:
        if bfloat:
            bits = pair.astype(np.float32).view(np.uint32)
            assert not (bits & 0xFFFF).any()  # exact, so nothing is rounded
            low, high = (int(b) >> 16 for b in bits)
        else:
            low, high = (int(b) for b in pair.astype(np.float16).view(np.uint16))
        return low | high << 16

    for line in assembly.strip("{} ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.strip().split(" ", 1)
        to, *given = [word.strip() for word in rest.split(",")]
        a = [value(word) for word in given]
        if name == "shr.u32":
            found = a[0] >> a[1]
        elif name == "shl.b32":
            found = a[0] << a[1] & 0xFFFFFFFF
        elif name == "and.b32":
            found = a[0] & a[1]
        elif name == "mov.b32":
            found = a[0]
        elif name == "lop3.b32":
            assert a[3] == 0xF0 & 0xCC | 0xAA
            found = a[0] & a[1] | a[2]
        elif name == "add.rn.f16x2":
            found = joined(halves(a[0], False) + halves(a[1], False), False)
        else:
            assert name == "fma.rn.bf16x2"
            one, two, three = (halves(x, True) for x in a)
            found = joined(one * two + three, True)
        registers[to] = found
    return registers["$0"]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_the_assembly_computes_every_value(half: bool, real: bool) -> None:
    """The interpreter runs Triton's own operations in its place, so it is executed here."""
    dtype = torch.float16 if half else torch.bfloat16
    known = values(E2M1).float() * (2.0**-14 if half else 1.0)
    for place in range(4):
        text = triton_w4a16.assembly.fn(place, half, real)
        for zero in (0.0,) if real else (0.0, 8.0, 15.0):
            constant = -(zero + (1024 if half else 128))
            if real:
                constant = 0.0 if half else 2.0**126
            bits = int(torch.tensor([constant], dtype=dtype).view(torch.int16)) & 0xFFFF
            for low in range(16):
                high = 15 - low
                word = 0xA5C3A5C3 & ~(0x000F000F << 4 * place)
                word |= low << 4 * place | high << 4 * place + 16
                out = execute(text, word, bits | bits << 16)
                halves = torch.tensor([out & 0xFFFF, out >> 16], dtype=torch.int32)
                found = halves.to(torch.uint16).view(dtype).float()
                codes = torch.tensor([low, high])
                assert torch.equal(found, known[codes] if real else codes - zero)


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


def test_every_kernel_compiles_for_gpus_that_are_not_here(
    capsys: pytest.CaptureFixture[str],
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(DRIVER)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    built = json.loads(done.stdout)
    assert {row["target"] for row in built} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in built:
        assert row["stack_bytes"] == 0, row  # nothing is spilled
        assert row["registers"] <= 255, row
        assert row["shared_bytes"] <= 160 * 1024, row
        assert row.get("tensor_memory", 0) <= 512, row
    for row in built:
        if row["kernel"] != "w4a16" or row["target"] not in ("sm_80", "sm_90"):
            continue
        assert row["products"] == ["HMMA" if row["target"] == "sm_80" else "HGMMA"], row
        # weights: global memory -> shared memory -> operand registers, and no other way
        assert row["copies"] >= 6, row
        assert max(row["copy_bytes"]) == 16, row
        assert row["operand_in_registers"], row
        assert row["matrices_moved"] == 0, row
        if row["bits"] == 4 and row["group"] >= 128 and row["rows"] <= 32:
            assert row["per_weight"] <= 4, row
    with capsys.disabled():
        worst = max(built, key=lambda row: row["registers"])
        print(f"\n{len(built)} kernels, nothing spilled; most registers: {worst}")


def test_the_gpu_benchmark_runs_dry() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "bench_w4a16.py"
    done = subprocess.run(
        [sys.executable, str(script), "--dry"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("of the allowed error") == 14
    assert "nothing was timed" in done.stdout
