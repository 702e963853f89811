"""Scheme names, and what they cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BadRequest, UnknownName
from bitwright.numerics.grids import E2M1, E4M3, E8M0, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, PER_TOKEN
from bitwright.schemes.scheme import EXAMPLES, Scheme, Spec, parse_scheme

FLOAT_NAMES = ("NVFP4", "NVFP4A16", "MXFP4", "MXFP8")
KV = st.sampled_from(["", "-KV8-FP8", "-KV8-INT8", "-KV4"])


@st.composite
def canonical_names(draw: st.DrawFn) -> str:
    base = draw(
        st.one_of(
            st.sampled_from(FLOAT_NAMES),
            st.builds(
                "W{}A{}".format,
                st.integers(2, 8),
                st.sampled_from(["16", "8-INT8", "8-FP8", "4"]),
            ),
        )
    )
    return base + draw(KV)


@given(canonical_names())
def test_names_round_trip(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme.name == name
    assert parse_scheme(scheme.name) == scheme


@given(canonical_names(), st.booleans())
def test_case_and_spaces_do_not_matter(name: str, spaces: bool) -> None:
    text = f" {name.lower()} " if spaces else name.lower()
    assert parse_scheme(text) == parse_scheme(name)


@given(canonical_names(), canonical_names())
def test_different_names_are_different_schemes(a: str, b: str) -> None:
    assert (parse_scheme(a) == parse_scheme(b)) == (a == b)


@pytest.mark.parametrize(
    ("short", "full"),
    [
        ("W4A8", "W4A8-INT8"),
        ("W4A8KV4", "W4A8-INT8-KV4"),
        ("W8A8-FP8-KV8", "W8A8-FP8-KV8-FP8"),
        ("W4A4-INT4", "W4A4"),
        ("w4a16kv8", "W4A16-KV8-FP8"),
    ],
)
def test_short_names_mean_their_full_form(short: str, full: str) -> None:
    assert parse_scheme(short).name == full


@pytest.mark.parametrize(
    "wrong",
    ["", "W4", "A16", "W9A16", "W1A16", "W4A7", "W8A8", "INT4", "W4A16-FP8", "W4A16-KV3",
     "W4A16-KV4-FP8", "KV8", "W4A16x", "NVFP8"],
)  # fmt: skip
def test_a_wrong_name_lists_the_right_ones(wrong: str) -> None:
    with pytest.raises(UnknownName) as caught:
        parse_scheme(wrong)
    for name in EXAMPLES:
        assert name in str(caught.value)
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_name_that_errors_suggest_exists(name: str) -> None:
    assert parse_scheme(name).name == name


def test_what_the_names_stand_for() -> None:
    assert parse_scheme("W3A16") == Scheme(Spec(IntGrid(3), (1, 128)))
    int8 = parse_scheme("W8A8-INT8")
    assert (int8.weight.grid, int8.weight.group) == (IntGrid(8), PER_CHANNEL)
    assert int8.input is not None
    assert (int8.input.grid, int8.input.group, int8.input.mode) == (
        IntGrid(8), PER_TOKEN, "dynamic",
    )  # fmt: skip
    fp8 = parse_scheme("W8A8-FP8-KV8")
    assert fp8.input is not None
    assert fp8.kv_cache is not None
    assert (fp8.weight.grid, fp8.input.grid, fp8.kv_cache.grid) == (E4M3, E4M3, E4M3)
    assert fp8.kv_cache.group == PER_TENSOR
    nvfp4 = parse_scheme("NVFP4").weight
    assert (nvfp4.grid, nvfp4.group, nvfp4.scale, nvfp4.two_level) == (E2M1, (1, 16), E4M3, True)
    assert parse_scheme("MXFP4").weight.scale == E8M0


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (Spec(IntGrid(4), (1, 128)), 4 + 16 / 128),
        (Spec(IntGrid(4), (1, 64)), 4.25),
        (Spec(IntGrid(4, signed=False), (1, 64), asymmetric=True), 4 + (16 + 4) / 64),
        (Spec(IntGrid(3), (1, 32), scale=torch.float32), 4.0),
        (Spec(IntGrid(8), PER_CHANNEL), 8 + 16 / 256),
        (Spec(IntGrid(8), PER_TENSOR, scale=torch.float32), 8 + 32 / (256 * 512)),
        (Spec(E4M3, (128, 128), scale=torch.float32), 8 + 32 / 128**2),
        (Spec(E2M1, (1, 16), scale=E4M3, two_level=True), 4.5 + 32 / (256 * 512)),
        (Spec(E2M1, (1, 32), scale=E8M0), 4.25),
    ],
)
def test_bits_per_value_count_scales_and_zero_points(spec: Spec, bits: float) -> None:
    width = 256 if spec.group == PER_CHANNEL else 512
    rows = 256 * 512 // width if spec.group == PER_TENSOR else 256
    assert spec.bits_per_value((rows, width)) == pytest.approx(bits, rel=1e-12)


def test_with_weight() -> None:
    scheme = parse_scheme("W4A16")
    changed = scheme.with_weight(group_size=64, asymmetric=True)
    assert changed.weight == Spec(IntGrid(4, signed=False), (1, 64), asymmetric=True)
    assert changed.name == "W4A16"
    assert scheme.weight.group == (1, 128)
    for options in ({"group_size": 64}, {"asymmetric": True}):
        with pytest.raises(BadRequest):
            parse_scheme("NVFP4").with_weight(**options)
