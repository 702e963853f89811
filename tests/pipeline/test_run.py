"""A whole run: same bytes twice, shards, ties, what comes along, and what the report says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.cli import run_apart
from support.models import VOCABULARY, distance, logits, make_model, reference_logits

import bitwright
from bitwright.errors import BadRequest
from bitwright.formats import get_format
from bitwright.methods.compose import METHODS
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import read_layer
from bitwright.schemes.quantized import dequantize

TOKENS = torch.arange(64).reshape(2, 32) * 5 % VOCABULARY


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_gives_the_same_bytes(llama: Path, text: Path, tmp_path: Path) -> None:
    outputs = []
    for name, hashing in (("a", "1"), ("b", "2")):
        ran = run_apart(
            "quantize", llama, tmp_path / name, "--method", "gptq", "--calibration", text,
            "--samples", 8, "--sequence-length", 64, "--seed", 3, "--quiet",
            PYTHONHASHSEED=hashing,
        )  # fmt: skip
        assert (ran.code, ran.out, ran.err) == (0, "", "")
        outputs.append(_files(tmp_path / name))
    assert outputs[0].keys() == outputs[1].keys()
    for name in outputs[0]:
        assert outputs[0][name] == outputs[1][name], name
    assert {"config.json", "quantization_report.json", "tokenizer.json"} < outputs[0].keys()


def test_the_seed_chooses_the_samples(llama: Path, text: Path, tmp_path: Path) -> None:
    request = {"method": "gptq", "calibration": str(text), "samples": 4, "sequence_length": 64}
    for seed in (0, 1):
        bitwright.quantize(llama, tmp_path / str(seed), seed=seed, **request)
    assert _weights(tmp_path / "0").keys() == _weights(tmp_path / "1").keys()
    assert any(
        not torch.equal(tensor, _weights(tmp_path / "1")[name])
        for name, tensor in _weights(tmp_path / "0").items()
    )


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


@pytest.mark.parametrize("shard", ["60KB", "200KB"])
def test_shards_do_not_matter(shard: str, llama: Path, tmp_path: Path) -> None:
    sharded = make_model(tmp_path / "sharded", shard=shard)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    bitwright.quantize(llama, tmp_path / "a", group_size=32)
    bitwright.quantize(sharded, tmp_path / "b", group_size=32)
    a, b = _weights(tmp_path / "a"), _weights(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt"])
def test_tied_embeddings_stay_tied(
    architecture: str, method: str, text: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", architecture, tie_word_embeddings=True)
    assert not any("lm_head" in name for name in _weights(model))
    calibration = str(text) if method == "gptq" else None
    bitwright.quantize(
        model, tmp_path / "out", scheme="W8A16", method=method, group_size=32,
        calibration=calibration, samples=8, sequence_length=64,
    )  # fmt: skip
    assert not any("lm_head" in name for name in _weights(tmp_path / "out"))
    loaded, _ = bitwright.load(tmp_path / "out")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert distance(logits(loaded, TOKENS), reference_logits(model, TOKENS)) < 0.05


def test_bfloat16_models(text: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", dtype=torch.bfloat16)
    bitwright.quantize(
        model, tmp_path / "out", scheme="W8A16", method="gptq", group_size=32,
        calibration=str(text), samples=8, sequence_length=64,
    )  # fmt: skip
    out = _weights(tmp_path / "out")
    assert out["model.embed_tokens.weight"].dtype is torch.bfloat16
    loaded, _ = bitwright.load(tmp_path / "out")
    assert distance(logits(loaded, TOKENS), reference_logits(model, TOKENS)) < 0.1


def test_everything_else_is_copied_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    (llama / "chat_template.jinja").write_text("{{ messages[0].content }}")
    try:
        bitwright.quantize(llama, tmp_path / "out", group_size=32, ignore=["o_proj"])
    finally:
        template = (llama / "chat_template.jinja").read_text()
        (llama / "chat_template.jinja").unlink()
    before, after = _weights(llama), _weights(tmp_path / "out")
    replaced = {name for name in before if name not in after}
    kinds = {name.split(".")[-2] for name in replaced}
    assert kinds == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name
    copied = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()
    assert (tmp_path / "out/chat_template.jinja").read_text() == template
    config = json.loads((tmp_path / "out/config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    assert set(quantization["ignore"]) == {
        "lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2)),
    }  # fmt: skip


def test_rounding_matches_the_stored_codes(llama: Path, tmp_path: Path) -> None:
    bitwright.quantize(llama, tmp_path / "out", group_size=32, search="absmax")
    source = load_file(llama / "model.safetensors")
    out = open_checkpoint(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj"
    q = read_layer(out, get_format("compressed-tensors"), name)
    groups = source[f"{name}.weight"].reshape(128, 2, 32)
    expected = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    assert torch.equal(q.scale_RG, expected)
    scale = expected.float()[..., None]
    rounded = torch.round(groups / scale).clamp(-8, 7) * scale
    assert torch.equal(dequantize(q), rounded.reshape(128, 64))


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fewer_bits_lose_more(bits: int, asymmetric: bool, llama: Path, tmp_path: Path) -> None:
    report = bitwright.quantize(
        llama, tmp_path / "out", scheme=f"W{bits}A16", group_size=32, asymmetric=asymmetric
    )
    assert report.plan.bits_per_weight == bits + (16 + (bits if asymmetric else 0)) / 32
    errors = [layer.error for layer in report.layers if layer.error is not None]
    mean = sum(errors) / len(errors)
    # a quarter of the error for every bit more
    assert 0.02 < mean * 4 ** (bits - 2) < 0.6
    loaded, _ = bitwright.load(tmp_path / "out")
    assert bool(torch.isfinite(logits(loaded, TOKENS)).all())


def test_calibration_pays_on_its_own_text(llama: Path, text: Path, tmp_path: Path) -> None:
    divergence = {}
    for method in ("rtn", "gptq"):
        bitwright.quantize(
            llama, tmp_path / method, scheme="W3A16", method=method, group_size=32,
            calibration=str(text) if method == "gptq" else None, samples=32, sequence_length=64,
        )  # fmt: skip
        divergence[method] = bitwright.evaluate(
            tmp_path / method, reference=llama, text=str(text), windows=16, sequence_length=64
        ).kl_divergence
    assert divergence["gptq"] < 0.9 * divergence["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_model_that_runs(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    report = bitwright.quantize(
        llama, tmp_path / "out", scheme="W8A16", method=method, group_size=32,
        calibration=str(text), samples=10, sequence_length=32,
    )  # fmt: skip
    assert [layer.fallback for layer in report.layers if layer.fallback] == []
    loaded, _ = bitwright.load(tmp_path / "out")
    assert distance(logits(loaded, TOKENS), reference_logits(llama, TOKENS)) < 0.06


def test_the_measured_error_is_that_of_the_output(llama: Path, text: Path, tmp_path: Path) -> None:
    report = bitwright.quantize(
        llama, tmp_path / "out", method="gptq", group_size=32, calibration=str(text),
        samples=8, sequence_length=64,
    )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj"
    (row,) = (row for row in report.layers if row.name == name)
    prepared = bitwright.prepare(
        llama, method="gptq", calibration=str(text), samples=8, sequence_length=64
    )
    from bitwright.api import calibration_tokens

    assert prepared.plan.calibration is not None
    tokens, _ = calibration_tokens(prepared.source, prepared.plan.calibration, 0)
    model, _ = bitwright.load(llama)
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, tokens)
    x = torch.cat(seen).reshape(-1, 64).double()
    before = model.get_submodule(name).weight.double()
    fmt = get_format("compressed-tensors")
    after = dequantize(read_layer(open_checkpoint(tmp_path / "out"), fmt, name)).double()
    expected = (x @ (before - after).T).square().sum() / (x @ before.T).square().sum()
    assert row.error == pytest.approx(float(expected), rel=1e-3)


def test_the_output_folder_is_made_with_its_parents(llama: Path, tmp_path: Path) -> None:
    bitwright.quantize(llama, tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/config.json").exists()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["out"]


def test_without_overwrite_nothing_is_replaced(llama: Path, tmp_path: Path) -> None:
    bitwright.quantize(llama, tmp_path / "out")
    before = _files(tmp_path / "out")
    with pytest.raises(BadRequest, match="--overwrite"):
        bitwright.quantize(llama, tmp_path / "out", scheme="W8A16")
    assert _files(tmp_path / "out") == before
    bitwright.quantize(llama, tmp_path / "out", scheme="W8A16", overwrite=True)
    assert _files(tmp_path / "out") != before


def test_text_the_model_writes_itself(llama: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        bitwright.quantize(
            llama, tmp_path / out, method="gptq", calibration="self", samples=4,
            sequence_length=24, seed=5,
        )  # fmt: skip
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
