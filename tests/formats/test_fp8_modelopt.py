"""fp8 and modelopt: their own inverses, what the formats' readers expect, and whole runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import logits, make_model

import bitwright
from bitwright.api_convert import convert
from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats import get_format
from bitwright.methods.rtn import rtn
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.kv_load import read_cache_scales
from bitwright.runtime.load import format_of, load_model, read_layer
from bitwright.schemes.inputs import needs_calibrated_scale
from bitwright.schemes.quantized import CacheScales, QuantizedLinear
from bitwright.schemes.scheme import Scheme, parse_scheme

NAME = "model.layers.0.self_attn.q_proj"
FP8 = parse_scheme("W8A8-FP8").with_scales(torch.float32)
CASES: dict[str, tuple[str, Scheme]] = {
    "fp8 tensor": ("fp8", FP8.with_granularity("tensor")),
    "fp8 static": ("fp8", FP8.with_activations("static").with_granularity("tensor")),
    "fp8 block": ("fp8", FP8.with_granularity("block")),
    "FP8": ("modelopt", FP8.with_activations("static").with_granularity("tensor")),
    "FP8_PER_CHANNEL_PER_TOKEN": ("modelopt", FP8),
    "FP8_PB_WO": ("modelopt", FP8.with_granularity("block")),
    "NVFP4": ("modelopt", parse_scheme("NVFP4")),
    "W4A16_NVFP4": ("modelopt", parse_scheme("NVFP4A16")),
}
TOKENS = torch.arange(3, 40)[None]


def made(scheme: Scheme, rows: int, cols: int, seed: int) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    q = rtn(torch.randn(rows, cols, generator=generator), None, scheme.weight, search="absmax")
    scale = None
    if scheme.input is not None and needs_calibrated_scale(scheme.input):
        scale = torch.rand(1, generator=generator) + 0.1
    bias = torch.randn(rows, generator=generator) if seed % 2 else None
    return replace(q, input_spec=scheme.input, input_scale=scale, bias_O=bias)


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    assert (a.spec, a.input_spec) == (b.spec, b.input_spec)
    for field in ("codes_OI", "scale_RG", "global_scale", "input_scale", "bias_O"):
        one, other = getattr(a, field), getattr(b, field)
        assert (one is None) == (other is None), field
        if one is not None:
            assert one.dtype == other.dtype, field
            assert torch.equal(one.float(), other.float()), field


@pytest.mark.parametrize("case", CASES)
@given(rows=st.integers(1, 300), groups=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_decode_undoes_encode(case: str, rows: int, groups: int, seed: int) -> None:
    name, scheme = CASES[case]
    fmt = get_format(name)
    if case == "FP8_PB_WO":
        rows, groups = -(-rows // 128) * 128, 8 * groups
    q = made(scheme, rows, 16 * groups, seed)
    fmt.check(NAME, q.shape, scheme)
    tensors = fmt.encode(NAME, q)
    config = json.loads(json.dumps(fmt.config({NAME: scheme}, ["lm_head"])))
    assert_same(fmt.decode(NAME, tensors, config), q)
    assert fmt.quantized_names(set(tensors)) == {NAME}
    assert fmt.ignored(config) == ["lm_head"]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    for legacy in fmt.companions(config).values():
        assert_same(fmt.decode(NAME, tensors, legacy), q)
        assert fmt.ignored(legacy) == ["lm_head"]


def test_names_and_shapes_are_those_the_readers_expect() -> None:
    shapes = {}
    for case, (name, scheme) in CASES.items():
        tensors = get_format(name).encode("x", made(scheme, 256, 384, 0))
        shapes[case] = {key: (list(t.shape), t.dtype) for key, t in tensors.items()}
    weight = ([256, 384], torch.float8_e4m3fn)
    assert shapes["fp8 tensor"] == {"x.weight": weight, "x.weight_scale": ([1], torch.float32)}
    assert shapes["fp8 static"]["x.input_scale"] == ([1], torch.float32)
    assert shapes["fp8 block"]["x.weight_scale_inv"] == ([2, 3], torch.float32)
    assert shapes["FP8"] == {
        "x.weight": weight,
        "x.weight_scale": ([], torch.float32),
        "x.input_scale": ([], torch.float32),
    }
    assert shapes["FP8_PER_CHANNEL_PER_TOKEN"]["x.weight_scale"] == ([256], torch.float32)
    assert shapes["FP8_PB_WO"]["x.weight_scale"] == ([2, 1, 3, 1], torch.float32)
    assert shapes["NVFP4"] == {
        "x.weight": ([256, 192], torch.uint8),
        "x.weight_scale": ([256, 24], torch.float8_e4m3fn),
        "x.weight_scale_2": ([], torch.float32),
        "x.input_scale": ([], torch.float32),
    }


def test_transformers_names_of_fp8_are_read() -> None:
    name, scheme = CASES["fp8 static"]
    fmt, q = get_format(name), made(scheme, 8, 16, 0)
    tensors = fmt.encode("x", q)
    tensors["x.weight_scale_inv"] = tensors.pop("x.weight_scale").reshape(())
    tensors["x.activation_scale"] = tensors.pop("x.input_scale").reshape(())
    assert_same(fmt.decode("x", tensors, fmt.config({"x": scheme}, [])), q)


@pytest.mark.parametrize("case", ["fp8 static", "fp8 block", "FP8", "NVFP4"])
def test_what_is_missing_or_misshapen_is_named(case: str) -> None:
    name, scheme = CASES[case]
    fmt = get_format(name)
    tensors, config = fmt.encode("x", made(scheme, 256, 384, 0)), fmt.config({"x": scheme}, [])
    for key in tensors:
        with pytest.raises(BadCheckpoint, match="layer x"):
            fmt.decode("x", {k: t for k, t in tensors.items() if k != key}, config)
    scale = next(key for key in tensors if ".weight_scale" in key)
    with pytest.raises(BadCheckpoint, match="do not fit"):
        fmt.decode("x", tensors | {scale: torch.ones(3, 5)}, config)
    with pytest.raises(BadCheckpoint, match="its weight is"):
        fmt.decode("x", tensors | {"x.weight": torch.ones(256, 384)}, config)


def test_what_cannot_be_stored_is_refused() -> None:
    fp8, modelopt = get_format("fp8"), get_format("modelopt")
    with pytest.raises(BadRequest, match="add --granularity tensor or block"):
        fp8.check("x", (64, 64), FP8)
    with pytest.raises(BadRequest, match="fp8 stores W8A8-FP8, not W4A16"):
        fp8.check("x", (64, 64), parse_scheme("W4A16"))
    with pytest.raises(BadRequest, match="cache"):
        fp8.check("x", (64, 64), CASES["fp8 tensor"][1].with_kv_cache("fp8"))
    with pytest.raises(BadRequest, match="--activations static --granularity tensor"):
        modelopt.check("x", (64, 64), FP8.with_granularity("tensor"))
    with pytest.raises(BadShape, match="multiples of 128"):
        modelopt.check("x", (192, 576), CASES["FP8_PB_WO"][1])
    with pytest.raises(BadRequest, match="FP8 cache"):
        modelopt.check("x", (64, 64), FP8.with_kv_cache("int8"))
    with pytest.raises(BadRequest, match="not per head"):
        modelopt.encode_cache("a", CacheScales(torch.ones(2), torch.ones(2)))
    for config in ({"quant_algo": "W4A16_AWQ"}, {}):
        with pytest.raises(BadCheckpoint, match="known: FP8"):
            modelopt.decode("x", {}, config)
    with pytest.raises(BadCheckpoint, match="activation_scheme"):
        fp8.decode("x", {}, {"activation_scheme": "sometimes"})
    with pytest.raises(BadCheckpoint, match="blocks of"):
        fp8.decode("x", {}, {"activation_scheme": "dynamic", "weight_block_size": [64, 64]})


STATIC = {"activations": "static", "granularity": "tensor"}
RUNS: dict[str, dict[str, Any]] = {
    "fp8 tensor": {"format": "fp8", "scheme": "W8A8-FP8", "granularity": "tensor"},
    "fp8 static": {"format": "fp8", "scheme": "W8A8-FP8", **STATIC},
    "fp8 block": {"format": "fp8", "scheme": "W8A8-FP8", "granularity": "block"},
    "FP8": {"format": "modelopt", "scheme": "W8A8-FP8", **STATIC},
    "FP8_PER_CHANNEL_PER_TOKEN": {"format": "modelopt", "scheme": "W8A8-FP8"},
    "FP8_PB_WO": {"format": "modelopt", "scheme": "W8A8-FP8", "granularity": "block"},
    "NVFP4": {"format": "modelopt", "scheme": "NVFP4"},
    "W4A16_NVFP4": {"format": "modelopt", "scheme": "NVFP4A16"},
}


@pytest.mark.parametrize("case", RUNS)
def test_whole_runs_and_conversions_compute_the_same(
    case: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    request = {"samples": 4, "sequence_length": 64} | RUNS[case]
    model = model_of("llama")
    if request.get("granularity") == "block":
        model = make_model(
            tmp_path / "wide",
            hidden_size=128,
            intermediate_size=256,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
        )
    bitwright.quantize(model, tmp_path / "a", **request)
    twin = tmp_path / "b"
    done = convert(tmp_path / "a", twin, format="compressed-tensors")
    assert done.requantized == {}
    expected = logits(load_model(open_checkpoint(twin), dtype=torch.float32), TOKENS)
    own = logits(load_model(open_checkpoint(tmp_path / "a"), dtype=torch.float32), TOKENS)
    torch.testing.assert_close(own, expected)
    convert(twin, tmp_path / "c", format=request["format"])
    for folder in ("a", "c"):
        checkpoint = open_checkpoint(tmp_path / folder)
        fmt = format_of(checkpoint)
        assert fmt is not None
        assert fmt.name == request["format"]
    first, third = (open_checkpoint(tmp_path / folder) for folder in ("a", "c"))
    for name in fmt.quantized_names(set(first.tensors)):
        assert_same(read_layer(first, fmt, name), read_layer(third, fmt, name))


def test_the_older_config_file_of_modelopt_is_enough(
    model_of: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    request = {"scheme": "W8A8-FP8", "kv_cache": "fp8", "samples": 4, "sequence_length": 64}
    bitwright.quantize(model_of("llama"), out, format="modelopt", **request)
    stored = open_checkpoint(out)
    model = load_model(stored, dtype=torch.float32)
    fmt = get_format("modelopt")
    scales = read_cache_scales(stored, fmt, model)
    assert scales
    assert all(float(s.key) > 0 and float(s.value) > 0 for s in scales.values())
    file = out / "hf_quant_config.json"
    assert json.loads(file.read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    again = load_model(open_checkpoint(out), dtype=torch.float32)
    torch.testing.assert_close(logits(again, TOKENS), logits(model, TOKENS))
