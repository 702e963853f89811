"""Rotated checkpoints: the same function where it can be proved, one clear line where not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.fixtures import ModelFactory
from support.models import distance, logits, make_model, reference_logits
from torch import Tensor, nn

import bitwright
from bitwright.api import load, quantize
from bitwright.errors import BadCheckpoint, BadRequest, UnsupportedModel
from bitwright.pipeline.checkpoint import Checkpoint, open_checkpoint
from bitwright.pipeline.online import KEY, install_online, online_hadamards, transform_config
from bitwright.pipeline.rotation import rotate_checkpoint
from bitwright.pipeline.topology import discover

TOKENS = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(5))
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite")


def rotated(source: Path, target: Path, **options: Any) -> Checkpoint:
    checkpoint = open_checkpoint(source)
    return rotate_checkpoint(checkpoint, discover(checkpoint), target, **options)


def with_gains(source: Path, folder: Path) -> Path:
    """A copy whose norms have gains: those of a random model are all neutral."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(9)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if "norm" in name and name.endswith("weight"):
                noise = torch.rand(value.shape, generator=generator).to(value.dtype)
                tensors[name] = value + noise * 0.8 - 0.4
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def without_post_norms(folder: Path) -> Path:
    """Gemma 3 with neutral norms after attention and MLP."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "post_" in name:
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_the_rotated_model_is_the_same_function(
    architecture: str, model_of: ModelFactory, tmp_path: Path
) -> None:
    source = with_gains(model_of(architecture), tmp_path / "source")
    checkpoint = rotated(source, tmp_path / "rotated")
    with torch.no_grad():
        actual = load(checkpoint.folder)[0](input_ids=TOKENS).logits
    assert distance(actual, reference_logits(source, TOKENS)) < 1e-5
    before, after = load_file(source / "model.safetensors"), checkpoint.read(checkpoint.tensors)
    moved = {name for name in before if distance(after[name], before[name]) > 0.1}
    assert {name for name in before if before[name].ndim == 2} <= moved | {"lm_head.weight"}
    ends = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
    for name, value in after.items():
        if name.endswith(ends):
            assert torch.equal(value, torch.ones_like(value))


def test_a_gain_plus_one_becomes_zero(model_of: ModelFactory, tmp_path: Path) -> None:
    source = without_post_norms(with_gains(model_of("gemma3"), tmp_path / "source"))
    checkpoint = rotated(source, tmp_path / "rotated")
    with torch.no_grad():
        actual = load(checkpoint.folder)[0](input_ids=TOKENS).logits
    assert distance(actual, reference_logits(source, TOKENS)) < 1e-5
    gain = checkpoint.read(["model.layers.0.input_layernorm.weight"]).popitem()[1]
    assert not gain.any()


@pytest.mark.parametrize(
    ("architecture", "says"),
    [
        ("opt", r"final_layer_norm \(LayerNorm\) is not a plain RMS norm"),
        ("gpt-neox", r"final_layer_norm \(LayerNorm\) is not a plain RMS norm"),
        ("cohere", r"model.norm \(CohereLayerNorm\) is not a plain RMS norm"),
        ("opt-projected", "embeds tokens in 32 channels but its blocks work on 64"),
        ("gemma3", r"model.layers.0 \(Gemma3DecoderLayer\) computes something else in a rotated"),
    ],
)
def test_what_cannot_be_proved_is_refused_by_name(
    architecture: str, says: str, model_of: ModelFactory, tmp_path: Path
) -> None:
    source = with_gains(model_of(architecture), tmp_path / "source")
    with pytest.raises(UnsupportedModel, match=says) as caught:
        rotated(source, tmp_path / "rotated")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_record_says_what_was_done(llama: Path, tmp_path: Path) -> None:
    config = rotated(llama, tmp_path / "rotated", seed=3).config
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    online = [{"block": 128, "layers": names}]
    assert config[KEY] == {"online": online, "seed": 3, "r1": 64, "r2": [16]}
    assert online_hadamards(config)[0].layers == tuple(names)


def test_attention_without_a_value_layer_of_its_own_is_rotated_online(
    model_of: ModelFactory, tmp_path: Path
) -> None:
    config = rotated(model_of("phi3"), tmp_path / "rotated").config
    layers = {name.rpartition(".")[2] for e in online_hadamards(config) for name in e.layers}
    assert (layers, config[KEY]["r2"]) == ({"o_proj", "down_proj"}, [])


def test_without_online_transforms_any_reader_computes_the_same(
    llama: Path, tmp_path: Path
) -> None:
    checkpoint = rotated(llama, tmp_path / "rotated", online=False)
    assert online_hadamards(checkpoint.config) == []
    actual = reference_logits(checkpoint.folder, TOKENS)
    assert distance(actual, reference_logits(llama, TOKENS)) < 1e-5


def test_leaving_out_the_online_transform_breaks_the_model(llama: Path, tmp_path: Path) -> None:
    checkpoint = rotated(llama, tmp_path / "rotated")
    actual = reference_logits(checkpoint.folder, TOKENS)
    assert distance(actual, reference_logits(llama, TOKENS)) > 0.1


def test_a_tied_output_embedding_gets_its_own_weights(tmp_path: Path) -> None:
    source = with_gains(make_model(tmp_path / "m", tie_word_embeddings=True), tmp_path / "source")
    assert "lm_head.weight" not in open_checkpoint(source).tensors
    checkpoint = rotated(source, tmp_path / "rotated")
    assert checkpoint.config["tie_word_embeddings"] is False
    assert "lm_head.weight" in checkpoint.tensors
    with torch.no_grad():
        actual = load(checkpoint.folder)[0](input_ids=TOKENS).logits
    assert distance(actual, reference_logits(source, TOKENS)) < 1e-5


def test_mlp_widths_that_are_no_power_of_two(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", intermediate_size=96)
    for blocks, size in (("power of two", 32), ("full", 96)):
        checkpoint = rotated(source, tmp_path / str(size), blocks=blocks)
        assert online_hadamards(checkpoint.config)[0].block == size
        with torch.no_grad():
            actual = load(checkpoint.folder)[0](input_ids=TOKENS).logits
        assert distance(actual, reference_logits(source, TOKENS)) < 1e-5
        assert (transform_config(checkpoint.config) is None) == (size == 96)


def test_compressed_tensors_applies_the_same_transforms(llama: Path, tmp_path: Path) -> None:
    """Its own transform, put on the plain transformers model by its own function."""
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    checkpoint = rotated(llama, tmp_path / "rotated")
    config = transform_config(checkpoint.config)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    apply_transform_config(model, TransformConfig.model_validate(json.loads(json.dumps(config))))
    assert distance(logits(model, TOKENS), reference_logits(llama, TOKENS)) < 1e-5


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_quantizing_a_rotated_checkpoint_keeps_its_transforms(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    source = with_gains(llama, tmp_path / "source")
    rotated(source, tmp_path / "rotated")
    quantize(
        tmp_path / "rotated", tmp_path / "out", scheme="W8A16", group_size=32, method=method,
        calibration=str(text), samples=8, sequence_length=32,
    )  # fmt: skip
    with torch.no_grad():
        actual = load(tmp_path / "out")[0](input_ids=TOKENS).logits.float()
    assert distance(actual, reference_logits(source, TOKENS)) < 0.05
    config = open_checkpoint(tmp_path / "out").config
    assert config["quantization_config"]["transform_config"] == transform_config(config)


def test_calibration_sees_the_rotated_input(llama: Path, tmp_path: Path) -> None:
    """Hooks of the record run before those that observe."""
    checkpoint = rotated(llama, tmp_path / "rotated")
    seen: dict[str, Tensor] = {}

    def watch(key: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: seen.__setitem__(key, args[0].detach()))

    for key, folder in (("plain", llama), ("rotated", checkpoint.folder)):
        model = load(folder)[0]
        watch(key, model.get_submodule("model.layers.0.mlp.down_proj"))
        logits(model, TOKENS)
    assert distance(seen["rotated"], seen["plain"]) > 0.5
    ratio = seen["rotated"].norm(dim=-1) / seen["plain"].norm(dim=-1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-4, atol=0)


def test_a_seed_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    first, second, other = (
        rotated(llama, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    a, b, c = (checkpoint.read([name])[name] for checkpoint in (first, second, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_dtypes_stay(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", dtype=torch.bfloat16)
    checkpoint = rotated(source, tmp_path / "rotated")
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.bfloat16}
    with torch.no_grad():
        actual = load(checkpoint.folder)[0](input_ids=TOKENS).logits.float()
    assert distance(actual, reference_logits(source, TOKENS)) < 0.05


def test_an_existing_folder_is_not_touched(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "rotated").mkdir()
    with pytest.raises(BadRequest, match="exists"):
        rotated(llama, tmp_path / "rotated")


@pytest.mark.parametrize(
    "record",
    [
        {"online": [{"block": 128}]},
        {"online": [{"block": 92, "layers": ["lm_head"]}]},
        {"online": [{"block": 64, "layers": ["model.nowhere"]}]},
    ],
)
def test_a_damaged_record_is_refused(record: dict[str, Any], llama: Path) -> None:
    model = load(llama)[0]
    with pytest.raises(BadCheckpoint, match=r"config\.json"):
        install_online(model, {KEY: record})


def test_a_rotated_model_is_quantized_and_read_like_any_other(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    bitwright.rotate(llama, tmp_path / "rotated")
    with pytest.raises(BadRequest, match="exists"):
        bitwright.rotate(llama, tmp_path / "rotated")
    same = bitwright.evaluate(
        tmp_path / "rotated", reference=llama, text=str(text), windows=2, sequence_length=64
    )
    assert same.kl_divergence is not None
    assert same.kl_divergence < 1e-6
    bitwright.quantize(
        tmp_path / "rotated", tmp_path / "out", scheme="W4A4", method="gptq", group_size=32,
        calibration=str(text), samples=8, sequence_length=32,
    )  # fmt: skip
    with pytest.raises(BadRequest, match="quantized"):
        bitwright.rotate(tmp_path / "out", tmp_path / "again")
    low = bitwright.evaluate(
        tmp_path / "out", reference=llama, text=str(text), windows=2, sequence_length=64
    )
    assert low.kl_divergence is not None
    assert 1e-3 < low.kl_divergence < 2
