"""convert: the same codes and scales in every format that can hold them, else a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import run_here
from support.layers import same
from support.models import logits, make_model

import bitwright
from bitwright.api_convert import convert
from bitwright.errors import BadRequest
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import format_of, load_model, read_layer
from bitwright.schemes.quantized import QuantizedLinear, dequantize

TOKENS = torch.arange(3, 40)[None]
CACHED = {"samples": 4, "sequence_length": 32}  # enough for scales of a cache
Maker = Callable[..., Path]


@pytest.fixture(scope="module")
def made(model_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A quantized tiny model; the same request gives the same folder."""
    root = tmp_path_factory.mktemp("convert")

    def make(architecture: str = "llama", **request: Any) -> Path:
        name = "-".join(f"{key}={value}" for key, value in sorted(request.items()))
        folder = root / f"{architecture}-{name}"
        if not folder.exists():
            bitwright.quantize(model_of(architecture), folder, **request)
        return folder

    return make


def layers(folder: Path) -> dict[str, QuantizedLinear]:
    checkpoint = open_checkpoint(folder)
    fmt = format_of(checkpoint)
    assert fmt is not None
    names = fmt.quantized_names(set(checkpoint.tensors))
    return {name: read_layer(checkpoint, fmt, name) for name in names}


def everything(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(folder)
    return checkpoint.read(checkpoint.tensors)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [32, -1], ids=["group", "channel"])
def test_codes_and_scales_survive_a_round_through_all_formats(
    asymmetric: bool, group_size: int, made: Maker, tmp_path: Path
) -> None:
    start = made(group_size=group_size, asymmetric=asymmetric)
    expected = layers(start)
    route = ["gptq", "awq", "compressed-tensors", "awq", "gptq", "compressed-tensors"]
    before = start
    for step, format in enumerate(route):
        after = tmp_path / f"{step}"
        done = convert(before, after, format=format)
        assert done.layers == 14
        assert done.requantized == {}
        before = after
        found = layers(after)
        assert found.keys() == expected.keys()
        for name, q in found.items():
            assert torch.equal(q.codes_OI, expected[name].codes_OI)
            assert torch.equal(q.scale_RG.double(), expected[name].scale_RG.double())
            assert torch.equal(dequantize(q), dequantize(expected[name]))
            if format != "awq":
                assert q.spec.asymmetric == asymmetric
                assert same(q.zero_point_RG, expected[name].zero_point_RG)
    model, twin = (load_model(open_checkpoint(f), dtype=torch.float32) for f in (start, before))
    assert torch.equal(logits(model, TOKENS), logits(twin, TOKENS))


def test_float16_codes_go_through_bit_for_bit(made: Maker, tmp_path: Path) -> None:
    first = made(format="gptq", group_size=32)
    convert(first, tmp_path / "ct", format="compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", format="gptq")
    before, after = everything(first), everything(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same(before[name], after[name]) for name in before)
    for file in ("config.json", "quantize_config.json", "tokenizer.json"):
        assert (first / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    report = json.loads((tmp_path / "back" / "quantization_report.json").read_text())
    assert report["converted"] == {"from": "compressed-tensors", "to": "gptq", "requantized": {}}
    assert len(report["layers"]) == 15


def test_biases_and_layers_left_alone_are_carried(made: Maker, tmp_path: Path) -> None:
    start = made("qwen2", group_size=32, ignore=[r"layers\.0\.mlp\.up_proj"])
    convert(start, tmp_path / "out", format="gptq")
    before, after = everything(start), everything(tmp_path / "out")
    plain = [name for name in before if name.endswith((".bias", "norm.weight", "up_proj.weight"))]
    assert len(plain) >= 12
    assert all(same(before[name], after[name]) for name in plain)
    assert sorted(bitwright.inspect(tmp_path / "out")["left_alone"]) == [
        "lm_head", "model.layers.0.mlp.up_proj",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "format", "why"),
    [
        ({"scheme": "W3A16", "group_size": 32}, "awq", "W4 integers"),
        ({"scheme": "W5A16", "group_size": 32}, "gptq", "W2, W3, W4 and W8"),
    ],
)
def test_what_would_be_lost_is_said_and_done_only_on_request(
    request_: dict[str, Any], format: str, why: str, made: Maker, tmp_path: Path
) -> None:
    start, out = made(**request_), tmp_path / "out"
    with pytest.raises(BadRequest, match=rf"model\.layers\.0\..*{why}.*--requantize"):
        convert(start, out, format=format)
    assert list(tmp_path.iterdir()) == []
    done = convert(start, out, format=format, requantize=True)
    assert len(done.requantized) == 14
    found = layers(out)
    for name, q in layers(start).items():
        error = (dequantize(found[name]) - dequantize(q)).norm() / dequantize(q).norm()
        assert found[name].spec.grid.bits > q.spec.grid.bits
        assert 0 < float(error) < 0.1


def changed(folder: Path, out: Path, name: str, change: Callable[[Any], None]) -> Path:
    """A copy of a checkpoint with one tensor changed in place."""
    out.mkdir()
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            if name in tensors:
                change(tensors[name])
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        else:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def test_scales_that_float16_cannot_say_are_refused_by_layer(made: Maker, tmp_path: Path) -> None:
    layer = "model.layers.1.self_attn.k_proj"
    start = made(group_size=32)
    for value in (1e30, 1e-7):  # too large for float16, and not one of its subnormals

        def change(scale: torch.Tensor, value: float = value) -> None:
            scale[3, 1] = value

        bad = changed(start, tmp_path / str(value), f"{layer}.weight_scale", change)
        with pytest.raises(BadRequest, match=f"{layer}: 1 of its 64 scales.*float16"):
            convert(bad, tmp_path / "out", format="gptq")
    done = convert(bad, tmp_path / "out", format="gptq", requantize=True)
    assert list(done.requantized) == [layer]


def test_scattered_groups_are_refused(made: Maker, tmp_path: Path) -> None:
    layer = "model.layers.1.self_attn.k_proj"

    def reverse(g_idx: torch.Tensor) -> None:
        g_idx.copy_(g_idx.flip(0))

    start = changed(made(format="gptq", group_size=32), tmp_path / "in", f"{layer}.g_idx", reverse)
    with pytest.raises(BadRequest, match=f"{layer}.*scattered"):
        convert(start, tmp_path / "out", format="compressed-tensors")
    done = convert(start, tmp_path / "out", format="compressed-tensors", requantize=True)
    assert list(done.requantized) == [layer]
    error = dequantize(layers(tmp_path / "out")[layer]) - dequantize(layers(start)[layer])
    assert float(error.norm() / dequantize(layers(start)[layer]).norm()) < 0.2


def test_other_refusals(llama: Path, made: Maker, tmp_path: Path) -> None:
    start = made(group_size=32)
    with pytest.raises(BadRequest, match="not quantized"):
        convert(llama, tmp_path / "out", format="gptq")
    with pytest.raises(BadRequest, match="already stored"):
        convert(start, tmp_path / "out", format="compressed-tensors")
    with pytest.raises(BadRequest, match="the model itself"):
        convert(start, start, format="gptq")
    (tmp_path / "full").mkdir()
    with pytest.raises(BadRequest, match="--overwrite"):
        convert(start, tmp_path / "full", format="gptq")
    convert(start, tmp_path / "full", format="gptq", overwrite=True)
    assert len(layers(tmp_path / "full")) == 14


def test_cache_scales_go_where_both_formats_have_a_place(made: Maker, tmp_path: Path) -> None:
    start = made(scheme="W8A8-FP8-KV8-FP8", **CACHED)
    done = convert(start, tmp_path / "modelopt", format="modelopt")
    assert done.requantized == {}
    stored = everything(tmp_path / "modelopt")
    key = stored["model.layers.1.self_attn.k_proj.k_scale"]
    assert key.shape == ()
    assert torch.equal(key.reshape(1), everything(start)["model.layers.1.self_attn.k_scale"])
    assert not any(name.endswith("self_attn.k_scale") for name in stored)
    convert(tmp_path / "modelopt", tmp_path / "back", format="compressed-tensors")
    before, after = everything(start), everything(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():  # modelopt's scales are float32
        assert torch.equal(value.float(), after[name].float().view_as(value)), name
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (start, tmp_path / "back")
    ]
    assert configs[0]["kv_cache_scheme"] == configs[1]["kv_cache_scheme"]
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    scores = [
        bitwright.evaluate(folder, text=str(text), windows=2, sequence_length=16).perplexity
        for folder in (start, tmp_path / "modelopt", tmp_path / "back")
    ]
    assert scores[0] == scores[1] == scores[2]


@pytest.mark.parametrize(
    ("scheme", "format", "why"),
    [
        ("W4A16-KV8-FP8", "gptq", "gptq cannot store the scales"),
        ("W8A8-FP8-KV8-INT8", "modelopt", "an FP8 cache with static scales per tensor"),
    ],
)
def test_a_cache_without_a_place_is_lost_only_on_request(
    scheme: str, format: str, why: str, made: Maker, tmp_path: Path
) -> None:
    group: dict[str, Any] = {"group_size": 32} if scheme.startswith("W4") else {}
    start = made(scheme=scheme, **group, **CACHED)
    with pytest.raises(BadRequest, match=f"{why}.*--requantize"):
        convert(start, tmp_path / "out", format=format)
    done = convert(start, tmp_path / "out", format=format, requantize=True)
    assert why in done.requantized["the key-value cache"]
    assert not any(name.endswith(("k_scale", "v_scale")) for name in everything(tmp_path / "out"))
    config = open_checkpoint(tmp_path / "out").config["quantization_config"]
    assert config.get("kv_cache_scheme") is None


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    bitwright.quantize(model, tmp_path / "ct", group_size=32)
    convert(tmp_path / "ct", tmp_path / "out", format="gptq")
    assert "lm_head.weight" not in everything(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["dynamic"] == {}


def test_the_command(
    made: Maker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start, out = made(group_size=32), tmp_path / "out"
    ran = run_here(monkeypatch, capsys, "convert", start, out, "--format", "gptq", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["layers"] == 14
    ran = run_here(monkeypatch, capsys, "convert", start, tmp_path / "b", "--format", "ggml")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
