"""A checkpoint's own cache: read back, used, and the same in compressed-tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import VOCABULARY
from transformers import AutoModelForCausalLM

import bitwright
from bitwright.errors import BadCheckpoint
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.kv_load import cache_factory
from bitwright.runtime.load import load_model


@pytest.fixture(scope="module")
def folders(llama: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kv")
    for name in ("W8A16", "W8A16-KV8-FP8", "W8A16-KV8-INT8", "W8A16-KV4"):
        bitwright.quantize(
            llama, root / name, scheme=name, group_size=-1, calibration=str(text), samples=4,
            sequence_length=64,
        )  # fmt: skip
    return {folder.name: folder for folder in root.iterdir()}


def scores(folder: Path, text: Path) -> float:
    return bitwright.evaluate(folder, text=str(text), windows=3, sequence_length=64).perplexity


@pytest.mark.parametrize("scheme", ["W8A16-KV8-FP8", "W8A16-KV8-INT8"])
@pytest.mark.filterwarnings("default")
def test_compressed_tensors_computes_the_same(scheme: str, folders: dict[str, Path]) -> None:
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folders[scheme], dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    checkpoint = open_checkpoint(folders[scheme])
    model = load_model(checkpoint, dtype=torch.float32)
    new_cache = cache_factory(checkpoint, model)
    assert new_cache is not None
    tokens = torch.randint(1, VOCABULARY, (2, 40))
    with torch.no_grad():
        found = model(input_ids=tokens, past_key_values=new_cache()).logits
        expected = theirs(input_ids=tokens).logits
        unrounded = model(input_ids=tokens).logits
    distance = float((found - expected).norm() / expected.norm())
    effect = float((unrounded - expected).norm() / expected.norm())
    assert distance < effect / 20


@pytest.mark.filterwarnings("default")
def test_a_cache_of_run_time_scales_is_opened(folders: dict[str, Path]) -> None:
    """Only opened: that package takes "token" of a (B, H, T, D) tensor to mean batch and head."""
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folders["W8A16-KV4"], dtype=torch.float32, output_loading_info=True
    )
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    with torch.no_grad():
        assert bool(theirs(input_ids=torch.arange(1, 9)[None]).logits.isfinite().all())


def test_names_are_those_that_runtimes_read(folders: dict[str, Path]) -> None:
    stored = open_checkpoint(folders["W8A16-KV8-FP8"])
    names = {name for name in stored.tensors if name.endswith((".k_scale", ".v_scale"))}
    assert names == {f"model.layers.{i}.self_attn.{s}_scale" for i in (0, 1) for s in "kv"}
    scheme = stored.config["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    assert wanted.items() <= scheme.items()
    assert scheme["dynamic"] is False


def test_without_a_scheme_there_is_no_cache(folders: dict[str, Path], llama: Path) -> None:
    for folder in (folders["W8A16"], llama):
        checkpoint = open_checkpoint(folder)
        assert cache_factory(checkpoint, load_model(checkpoint)) is None


def test_evaluate_and_generate_use_the_cache(
    folders: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    folder = folders["W8A16-KV8-FP8"]
    right, plain = scores(folder, text), scores(folders["W8A16"], text)
    assert right != plain
    assert right == pytest.approx(plain, rel=0.05)
    answer = bitwright.generate(folder, "A quick", max_new_tokens=12)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            tensors = {n: t / 200 if n.endswith("v_scale") else t for n, t in tensors.items()}
            save_file(tensors, damaged / file.name, metadata={"format": "pt"})
        else:
            (damaged / file.name).write_bytes(file.read_bytes())
    assert abs(scores(damaged, text) / plain - 1) > 3 * abs(right / plain - 1)
    assert bitwright.generate(damaged, "A quick", max_new_tokens=12) != answer


def test_missing_scales_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["W8A16"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = json.loads((folders["W8A16-KV8-FP8"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(other))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.0\.self_attn"):
        cache_factory(checkpoint, load_model(checkpoint))
