"""Bytes of weights and caches, against numbers worked out by hand."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning.conftest import SMALL, WriteConfig

from bitwright import inspect, quantize
from bitwright.planning.memory import (
    SCHEMES,
    CacheBits,
    bits_per_weight,
    cache_bytes,
    cache_bytes_per_token,
    linear_bytes,
    weight_bytes,
)
from bitwright.planning.model import CacheLayer, Matrices, ModelFacts, model_facts

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
LINEARS = 68_451_041_280
ROWS = 80 * (2 * 8192 + 2 * 1024 + 2 * 28672 + 8192)  # output channels
REST = 2 * (2 * 32000 * 8192 + 161 * 8192)  # embeddings and norms, 16 bits
MATRICES = 80 * 7


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("W16A16", 2 * LINEARS + REST),
        ("W8A8-FP8", LINEARS + 2 * ROWS + REST),
        ("W8A8-INT8", LINEARS + 2 * ROWS + REST),
        ("W4A16", LINEARS // 2 + 2 * LINEARS // 128 + REST),
        ("NVFP4", LINEARS // 2 + LINEARS // 16 + 4 * MATRICES + REST),
        ("GGUF-Q4_0", LINEARS * 18 // 32 + 32000 * 8192 * 18 // 32 + 32000 * 8192 * 210 // 256
         + 2 * 161 * 8192),
        ("GGUF-Q8_0", (LINEARS + 2 * 32000 * 8192) * 34 // 32 + 2 * 161 * 8192),
    ],
)  # fmt: skip
def test_llama_2_70b(scheme: str, expected: int, llama70: Path) -> None:
    assert weight_bytes(BY_NAME[scheme], model_facts(llama70)) == expected


def test_llama_2_70b_in_words(llama70: Path) -> None:
    facts = model_facts(llama70)
    sizes = {name: weight_bytes(scheme, facts) / 1e9 for name, scheme in BY_NAME.items()}
    assert sizes["W16A16"] == pytest.approx(140, rel=0.02)
    assert sizes["W8A8-FP8"] == pytest.approx(70, rel=0.02)
    assert 36 < sizes["W4A16"] < 37
    assert bits_per_weight(BY_NAME["W4A16"], facts) == 4.125


def test_llama_2_70b_cache(llama70: Path) -> None:
    facts = model_facts(llama70)
    assert cache_bytes_per_token(facts, 16) == 80 * 2 * 8 * 128 * 2 == 327_680
    assert cache_bytes_per_token(facts, 8) == 163_840
    assert cache_bytes_per_token(facts, 4) == 80 * 2 * 8 * (64 + 2)  # a bfloat16 scale per head
    assert cache_bytes(facts, 16, 4096) == 327_680 * 4096


def test_windows_bound_the_cache(config: WriteConfig) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    facts = model_facts(
        config(model_type="gemma3_text", **SMALL, head_dim=16, sliding_window=16, layer_types=kinds)
    )
    each = 2 * 2 * 16 * 2
    assert cache_bytes(facts, 16, 10) == 3 * 10 * each
    assert cache_bytes(facts, 16, 1000) == (16 + 16 + 1000) * each


@pytest.mark.parametrize("scheme", ["W4A16"])
def test_prediction_is_what_is_written(scheme: str, llama: Path, tmp_path: Path) -> None:
    """To the byte, but for the metadata of the format."""
    predicted = weight_bytes(BY_NAME[scheme], model_facts(llama))
    quantize(llama, tmp_path / "out", scheme=scheme)
    written = sum(
        row["bytes"] if "group_size" in row else row["bytes"] // 2  # stored in float32 here
        for row in inspect(tmp_path / "out")["tensors"]
    )
    shapes = 2 * 7 * 2 * 8  # weight_shape, two int64 per layer
    assert predicted <= written <= predicted + shapes
    assert written - predicted in (0, shapes)


def test_gguf_rows_that_256_does_not_divide(config: WriteConfig) -> None:
    facts = model_facts(config(model_type="llama", **SMALL))
    assert bits_per_weight(BY_NAME["GGUF-Q4_K"], facts) == 5.5  # Q5_0
    assert bits_per_weight(BY_NAME["GGUF-Q6_K"], facts) == 8.5  # Q8_0


def test_read_experts() -> None:
    facts = _facts(64, 128, 2, experts=4)
    plain = linear_bytes(BY_NAME["W16A16"], facts)
    once = linear_bytes(BY_NAME["W16A16"], facts, read_by=1)
    routed = 2 * 4 * 64 * 128 * 2
    assert plain - once == pytest.approx(routed * 3 / 4)
    assert linear_bytes(BY_NAME["W16A16"], facts, read_by=10_000) == pytest.approx(plain)


@cache
def _facts(hidden: int, inner: int, layers: int, experts: int = 0) -> ModelFacts:
    linears = [Matrices((hidden, hidden), 4 * layers, 4 * layers)]
    count = layers * (experts or 1)
    linears.append(Matrices((inner, hidden), count, layers))
    size = sum(m.size * m.count for m in linears)
    caches = (CacheLayer(2 * hidden, 16, None),) * layers
    table = (320, hidden)
    return ModelFacts("made", size + 2 * 320 * hidden, tuple(linears), table, table, False, 0,
                      layers, hidden, hidden // 16, 16, experts, 1, caches, None)  # fmt: skip


shapes = st.builds(
    _facts,
    st.sampled_from([64, 128, 512, 576, 1024, 2048]),
    st.sampled_from([128, 256, 1536, 4096]),
    st.integers(1, 12),
    st.sampled_from([0, 4, 16]),
)


@given(facts=shapes)
def test_more_bits_never_take_less_memory(facts: ModelFacts) -> None:
    for family in (
        ["W16A16", "W8A8-FP8", "W4A16"],
        ["W16A16", "W8A8-INT8", "NVFP4"],
        ["W16A16", "GGUF-Q8_0", "GGUF-Q6_K", "GGUF-Q5_K", "GGUF-Q4_K"],
    ):
        sizes = [weight_bytes(BY_NAME[name], facts) for name in family]
        assert sizes == sorted(sizes, reverse=True)


@given(facts=shapes, context=st.integers(1, 200_000))
def test_more_cache_bits_never_take_less_memory(facts: ModelFacts, context: int) -> None:
    bits: tuple[CacheBits, ...] = (16, 8, 4)
    sizes = [cache_bytes(facts, one, context) for one in bits]
    assert sizes == sorted(sizes, reverse=True)
    assert cache_bytes(facts, 16, context + 1) > sizes[0]


@given(facts=shapes, tokens=st.integers(1, 1000))
def test_a_step_reads_no_more_than_is_stored(facts: ModelFacts, tokens: int) -> None:
    for scheme in SCHEMES:
        read = linear_bytes(scheme, facts, read_by=tokens)
        assert read <= linear_bytes(scheme, facts) * (1 + 1e-12)
        assert read <= linear_bytes(scheme, facts, read_by=tokens + 1) * (1 + 1e-12)
