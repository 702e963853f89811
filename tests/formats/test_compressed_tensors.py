"""The compressed-tensors format: its own inverse, and read by the package of that name."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from bitwright.errors import BadCheckpoint, BadRequest, BadShape, UnknownName
from bitwright.formats import FORMATS, get_format
from bitwright.methods.rtn import rtn
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, Group, scale_shape
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.quantized import QuantizedLinear, dequantize
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme

NAME = "model.layers.0.self_attn.q_proj"
FORMAT = get_format("compressed-tensors")
GOLDEN = Path(__file__).parent.parent / "golden" / "compressed_tensors.safetensors"


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
    return a.dtype is b.dtype and torch.equal(a.float(), b.float())


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


LOW_BIT = {
    "W8A8-INT8": parse_scheme("W8A8-INT8"),
    "W8A8-INT8 static": parse_scheme("W8A8-INT8").with_activations("static"),
    "W8A8-INT8 tensor": parse_scheme("W8A8-INT8").with_granularity("tensor"),
    "W8A8-FP8": parse_scheme("W8A8-FP8"),
    "W8A8-FP8 static": parse_scheme("W8A8-FP8").with_activations("static"),
    "W8A8-FP8 tensor": parse_scheme("W8A8-FP8").with_granularity("tensor"),
    "W8A8-FP8 block": parse_scheme("W8A8-FP8").with_granularity("block"),
    "W4A8-INT8": parse_scheme("W4A8-INT8").with_weight(group_size=32),
    "W4A8-FP8": parse_scheme("W4A8-FP8").with_weight(group_size=32),
    "W4A4": parse_scheme("W4A4").with_weight(group_size=32),
    "NVFP4": parse_scheme("NVFP4"),
    "NVFP4A16": parse_scheme("NVFP4A16"),
    "MXFP4": parse_scheme("MXFP4"),
    "MXFP8": parse_scheme("MXFP8"),
}


def _low_bit(scheme: Scheme, rows: int, cols: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    q = rtn(weight, None, scheme.weight, search="absmax")
    scale = None
    if scheme.input is not None and needs_calibrated_scale(scheme.input):
        scale = 1 / (1 / (torch.rand(1, generator=generator) + 0.1))
    return replace(q, input_spec=scheme.input, input_scale=scale)


@pytest.mark.parametrize("case", LOW_BIT)
@given(
    rows=st.integers(1, 300), groups=st.integers(1, 3), seed=st.integers(0, 99), wide=st.booleans()
)
@settings(max_examples=15)
def test_decode_undoes_encode_for_low_bit_inputs(
    case: str, rows: int, groups: int, seed: int, wide: bool
) -> None:
    scheme = LOW_BIT[case]
    q = _low_bit(scheme, rows, groups * (128 if wide or "block" in case else 32), seed)
    config = FORMAT.config({NAME: scheme}, ["lm_head"])
    back = FORMAT.decode(NAME, FORMAT.encode(NAME, q), config)
    assert (back.spec, back.input_spec) == (q.spec, q.input_spec)
    for field in ("codes_OI", "scale_RG", "global_scale", "input_scale"):
        assert _same(getattr(back, field), getattr(q, field)), field


@pytest.mark.parametrize("case", LOW_BIT)
def test_the_package_decompresses_the_same_low_bit_weight(case: str) -> None:
    scheme = LOW_BIT[case]
    q = _low_bit(scheme, 256, 256, 1)
    prefix = f"{NAME}."
    state = {key.removeprefix(prefix): t for key, t in FORMAT.encode(NAME, q).items()}
    config = FORMAT.config({NAME: scheme}, [])
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    reader = BaseCompressor.get_value_from_registry(config["format"])
    weight = reader.decompress(state, group)["weight"].float()
    tolerance = 0.01 if q.spec.two_level else 0  # the package divides scales in bfloat16
    torch.testing.assert_close(weight, dequantize(q, torch.bfloat16).float(),
                               rtol=tolerance, atol=0)  # fmt: skip


@cache
def golden() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(GOLDEN, framework="pt") as handle:
        configs = {name: json.loads(text) for name, text in handle.metadata().items()}
        return configs, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


@pytest.mark.parametrize("case", sorted(golden()[0]))
def test_layers_of_the_package_are_read_and_written_identically(case: str) -> None:
    configs, tensors = golden()
    stored = {name: t for name, t in tensors.items() if name.startswith(f"{case}.")}
    weight = stored.pop(f"{case}.weight_read")
    q = FORMAT.decode(case, stored, configs[case])
    if q.spec.two_level:  # the package divides scales in bfloat16
        torch.testing.assert_close(dequantize(q, weight.dtype), weight, rtol=0.01, atol=0)
    else:
        assert torch.equal(dequantize(q, weight.dtype), weight)
    written = FORMAT.encode(case, q)
    assert written.keys() == stored.keys()
    for name, tensor in written.items():
        assert _same(tensor, stored[name]), name


@pytest.mark.parametrize("lost", ["weight_global_scale", "input_global_scale", "weight_scale"])
def test_a_missing_second_scale_is_named(lost: str) -> None:
    scheme = LOW_BIT["NVFP4"]
    tensors = FORMAT.encode(NAME, _low_bit(scheme, 4, 32, 0))
    del tensors[f"{NAME}.{lost}"]
    with pytest.raises(BadCheckpoint, match=lost):
        FORMAT.decode(NAME, tensors, FORMAT.config({NAME: scheme}, []))


def test_codes_of_another_type_are_refused() -> None:
    scheme = LOW_BIT["W8A8-FP8"]
    tensors = FORMAT.encode(NAME, _low_bit(scheme, 4, 32, 0))
    tensors[f"{NAME}.weight"] = tensors[f"{NAME}.weight"].view(torch.int8)
    with pytest.raises(BadCheckpoint, match="int8"):
        FORMAT.decode(NAME, tensors, FORMAT.config({NAME: scheme}, []))


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
