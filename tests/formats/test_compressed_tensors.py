"""The compressed-tensors format: its own inverse, and read by the package of that name."""

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given
from hypothesis import strategies as st

from bitwright.errors import BadCheckpoint, BadRequest, BadShape, UnknownName
from bitwright.formats import FORMATS, get_format
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, Group, scale_shape
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec

NAME = "model.layers.0.self_attn.q_proj"
FORMAT = get_format("compressed-tensors")


@st.composite
def quantized_linears(draw: st.DrawFn) -> QuantizedLinear:
    bits = draw(st.integers(2, 8))
    asymmetric = draw(st.booleans())
    rows = draw(st.integers(1, 41))
    channel = draw(st.booleans())
    size = draw(st.sampled_from([8, 16, 32]))
    cols = draw(st.integers(1, 90)) if channel else size * draw(st.integers(1, 4))
    group: Group = PER_CHANNEL if channel else (1, size)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    scales = scale_shape((rows, cols), group)
    scale = torch.rand(scales, generator=generator) + 0.01
    sign = torch.where(torch.rand(scales, generator=generator) < 0.3, -1.0, 1.0)
    bias = draw(st.booleans())

    def codes(shape: tuple[int, int]) -> torch.Tensor:
        return torch.randint(1 << bits, shape, generator=generator).to(torch.uint8)

    return QuantizedLinear(
        codes_OI=codes((rows, cols)),
        scale_RG=(scale if asymmetric else scale * sign).to(dtype),
        spec=Spec(IntGrid(bits, not asymmetric), group, scale=dtype, asymmetric=asymmetric),
        zero_point_RG=codes(scales) if asymmetric else None,
        bias_O=torch.randn(rows, generator=generator) if bias else None,
    )


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype is b.dtype and torch.equal(a, b)


@given(quantized_linears())
def test_decode_undoes_encode(q: QuantizedLinear) -> None:
    tensors = FORMAT.encode(NAME, q)
    config = FORMAT.config({NAME: Scheme(q.spec)}, [])
    back = FORMAT.decode(NAME, tensors, config)
    assert back.spec == q.spec
    for field in ("codes_OI", "scale_RG", "zero_point_RG", "bias_O", "global_scale"):
        assert _same(getattr(back, field), getattr(q, field)), field
    assert FORMAT.quantized_names(set(tensors)) == {NAME}


@given(quantized_linears())
def test_the_compressed_tensors_package_reads_the_same_weight(q: QuantizedLinear) -> None:
    prefix = f"{NAME}."
    state = {key.removeprefix(prefix): t for key, t in FORMAT.encode(NAME, q).items()}
    config = QuantizationConfig.model_validate(FORMAT.config({NAME: Scheme(q.spec)}, []))
    (scheme,) = config.config_groups.values()
    weight = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(weight, dequantize(q, weight.dtype))
    assert weight.dtype is q.scale_RG.dtype


def test_several_schemes_are_told_apart_by_layer_name() -> None:
    layers = {
        "a.q_proj": Scheme(Spec(IntGrid(4), (1, 32))),
        "a.down_proj": Scheme(Spec(IntGrid(8), PER_CHANNEL)),
    }
    config = FORMAT.config(layers, ["lm_head"])
    assert config["ignore"] == ["lm_head"]
    for name, scheme in layers.items():
        q = QuantizedLinear(
            codes_OI=torch.zeros(2, 32, dtype=torch.uint8),
            scale_RG=torch.ones(2, 1, dtype=torch.bfloat16),
            spec=scheme.weight,
        )
        assert FORMAT.decode(name, FORMAT.encode(name, q), config).spec == scheme.weight
    with pytest.raises(BadCheckpoint, match="no config group"):
        FORMAT.decode("b.other", {}, config)


@pytest.mark.parametrize("missing", ["weight_packed", "weight_scale", "weight_shape"])
def test_a_missing_tensor_is_named(missing: str) -> None:
    spec = Spec(IntGrid(4), (1, 8))
    q = QuantizedLinear(
        torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1, dtype=torch.bfloat16), spec
    )
    tensors = FORMAT.encode(NAME, q)
    del tensors[f"{NAME}.{missing}"]
    with pytest.raises(BadCheckpoint, match=missing):
        FORMAT.decode(NAME, tensors, FORMAT.config({NAME: Scheme(spec)}, []))


def test_scales_that_do_not_fit_are_refused() -> None:
    spec = Spec(IntGrid(4), (1, 8))
    q = QuantizedLinear(
        torch.zeros(2, 16, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bfloat16), spec
    )
    tensors = FORMAT.encode(NAME, q) | {f"{NAME}.weight_scale": torch.ones(2, 3)}
    with pytest.raises(BadCheckpoint, match=r"scales \[2, 3\] do not fit"):
        FORMAT.decode(NAME, tensors, FORMAT.config({NAME: Scheme(spec)}, []))


def test_what_cannot_be_stored_is_refused_by_name() -> None:
    with pytest.raises(BadShape, match=f"{NAME}.*group size 48"):
        FORMAT.check(NAME, (8, 64), Scheme(Spec(IntGrid(4), (1, 48))))
    for spec in (Spec(IntGrid(4), (2, 8)), Spec(E4M3, (1, 8))):
        with pytest.raises(BadRequest, match=NAME):
            FORMAT.check(NAME, (8, 64), Scheme(spec))
    FORMAT.check(NAME, (8, 64), Scheme(Spec(IntGrid(4), (1, 32))))


def test_an_unknown_format_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        get_format("ggml")
    for name in FORMATS:
        assert name in str(caught.value)
