"""verify, in a real transformers process: good checkpoints pass, damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli import run_here
from support.models import make_model

import bitwright
from bitwright.errors import BadRequest, UnknownName
from bitwright.evaluation.verify import RUNTIMES, Verdict, _agreement, verify
from bitwright.evaluation.weights_check import rescaled_error, weights_check
from bitwright.formats.packing import pack, unpack

LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("verify") / "model", num_hidden_layers=3)


@pytest.fixture(scope="module")
def good(model: Path) -> Path:
    out = model.parent / "good"
    bitwright.quantize(model, out, group_size=32, asymmetric=True)
    return out


@pytest.fixture
def damaged(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "damaged"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change whichever file holds LAYER."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{LAYER}.weight_packed" in tensors or "lm_head.weight" in tensors:
            change(tensors)
            save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        stored = {
            name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)
        }
        value = json.loads(index.read_text()) | {"weight_map": stored}
        index.write_text(json.dumps(value))


def edit_json(folder: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def failed(verdict: Verdict) -> tuple[str, str]:
    assert not verdict.passed
    assert all(check.passed for check in verdict.checks[:-1])
    return verdict.checks[-1].name, verdict.checks[-1].detail


def test_a_good_checkpoint_passes_in_transformers(model: Path, good: Path) -> None:
    verdict = verify(good, runtime="transformers", reference=model)
    assert verdict.passed, verdict
    names = [check.name for check in verdict.checks]
    assert names[-2:] == ["log-probabilities agree", "greedy tokens agree"]
    assert len(names) == 9


def _zero_points_off_by_one(tensors: dict[str, torch.Tensor]) -> None:
    key = f"{LAYER}.weight_zero_point"
    if key in tensors:
        zero = unpack(tensors[key], 4, 64, dim=0)
        tensors[key] = pack((zero + 1) % 16, 4, dim=0)


def _nibbles_swapped(tensors: dict[str, torch.Tensor]) -> None:
    key = f"{LAYER}.weight_packed"
    if key in tensors:
        codes = unpack(tensors[key], 4, 128).reshape(64, -1, 2).flip(-1)
        tensors[key] = pack(codes.reshape(64, -1), 4)


def _no_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(f"{LAYER}.weight_scale", None)


def _left_unquantized(tensors: dict[str, torch.Tensor]) -> None:
    if f"{LAYER}.weight_packed" in tensors:
        for part in ("packed", "scale", "shape", "zero_point"):
            tensors.pop(f"{LAYER}.weight_{part}")
        tensors[f"{LAYER}.weight"] = torch.randn(64, 128)


@pytest.mark.parametrize(
    ("change", "check", "suspect"),
    [
        (_zero_points_off_by_one, "weights", LAYER),
        (_nibbles_swapped, "weights", LAYER),
        (_no_scales, "reads it", "weight_scale"),
        (_left_unquantized, "nothing is missing", LAYER),
    ],
)
def test_damaged_tensors_are_named(
    change: Callable[[dict[str, torch.Tensor]], None],
    check: str,
    suspect: str,
    model: Path,
    damaged: Path,
) -> None:
    edit_tensors(damaged, change)
    name, detail = failed(verify(damaged, runtime="transformers", reference=model))
    assert check in name
    assert suspect in detail


def test_a_wrong_group_size_is_found(damaged: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 64

    edit_json(damaged, "config.json", change)
    name, detail = failed(verify(damaged, runtime="transformers"))
    assert name == "bitwright reads it"
    assert "in groups of (1, 64)" in detail


def test_a_missing_shard_is_found(damaged: Path) -> None:
    next(damaged.glob("model-00002*.safetensors")).unlink()
    _, detail = failed(verify(damaged, runtime="transformers"))
    assert "model-00002" in detail


def test_a_head_that_is_tied_by_mistake_is_found(damaged: Path) -> None:
    edit_json(damaged, "config.json", lambda config: config.update(tie_word_embeddings=True))
    _, detail = failed(verify(damaged, runtime="transformers"))
    assert "suspect lm_head" in detail


def test_a_head_that_is_another_is_found(model: Path, damaged: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] = torch.randn_like(tensors["lm_head.weight"])

    edit_tensors(damaged, change)
    _, detail = failed(verify(damaged, runtime="transformers", reference=model))
    assert "suspect lm_head" in detail


def test_wrong_special_tokens_and_templates_are_found(model: Path, damaged: Path) -> None:
    edit_json(damaged, "generation_config.json", lambda value: value.update(eos_token_id=7))
    _, detail = failed(verify(damaged, runtime="transformers"))
    assert "suspect eos_token_id" in detail
    edit_json(damaged, "generation_config.json", lambda value: value.update(eos_token_id=[0, 9]))
    _, detail = failed(verify(damaged, runtime="transformers", reference=model))
    assert "suspect eos_token_id" in detail
    edit_json(damaged, "generation_config.json", lambda value: value.update(eos_token_id=0))
    (damaged / "chat_template.jinja").write_text("{{ messages }}")
    _, detail = failed(verify(damaged, runtime="transformers", reference=model))
    assert "suspect chat_template" in detail


def test_what_cannot_be_asked_is_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnknownName, match=r"llama\.cpp"):
        verify(good, runtime="ollama")
    with pytest.raises(BadRequest, match="convert --format gguf"):
        verify(good, runtime="llama.cpp")
    with pytest.raises(BadRequest, match="cannot start"):
        verify(good, runtime="vllm", python=tmp_path / "no-python")
    with pytest.raises(BadRequest, match=r"has no vllm.*--python"):
        verify(good, runtime="vllm")
    ran = run_here(monkeypatch, capsys, "verify", tmp_path, "--runtime", "transformers", "--json")
    assert ran.code == 1
    assert json.loads(ran.out)["checks"][0]["passed"] is False


def test_a_runtime_that_computes_something_else_fails(model: Path, good: Path) -> None:
    own, other = bitwright.load(good)[0].float(), bitwright.load(model)[0].float()
    prompts = [[5, 9, 11, 200, 31, 7, 77, 102], [3, 250, 14, 15, 92, 65, 35, 8]]
    for mine, expected in ((own, True), (other, False)):
        answer: dict[str, Any] = {"logprobs": [], "tokens": []}
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                scores = mine(input_ids=ids).logits[0].log_softmax(-1)
            answer["logprobs"].append(scores[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist())
            answer["tokens"].append([int(scores[-1].argmax())])
        checks = list(_agreement(own, prompts, answer, RUNTIMES["vllm"], "vllm"))
        assert checks[0].passed == expected
        assert ("suspect" in checks[0].detail) == (not expected)
    checks = list(_agreement(own, prompts, answer | {"tokens": [[1], [1]]}, RUNTIMES["vllm"], "v"))
    assert not checks[1].passed


def test_folded_scales_are_no_error() -> None:
    weight = torch.randn(16, 24)
    folded = weight * (torch.rand(16, 1) + 0.5) * (torch.rand(1, 24) + 0.5)
    assert rescaled_error(folded, weight) < 0.02
    assert rescaled_error(folded + 0.3 * torch.randn(16, 24), weight) > 0.15


def test_weights_may_move_where_inputs_do_not_reach(model: Path) -> None:
    other, own = (bitwright.load(model)[0].float() for _ in range(2))
    block = own.model.layers[0]
    layer = block.self_attn.q_proj
    moved = 5 * layer.weight.std() * torch.randn(len(layer.weight))
    with torch.no_grad():
        block.input_layernorm.weight[0] = 0
        layer.weight[:, 0] += moved
    prompts = [[5, 9, 11, 200, 31, 7, 77, 102]]
    assert rescaled_error(layer.weight, other.model.layers[0].self_attn.q_proj.weight) > 0.1
    assert weights_check(own, other, prompts, None).passed
    with torch.no_grad():
        layer.weight[:, 1:9] += moved[:, None]
    check = weights_check(own, other, prompts, None)
    assert not check.passed
    assert check.detail.startswith("suspect model.layers.0.self_attn.q_proj")


def test_quantize_verifies_at_the_end(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    request = ("quantize", model, out, "--group-size", "32", "--json")
    done = run_here(monkeypatch, capsys, *request, "--verify", "ollama")
    assert done.code == 2
    assert "unknown runtime 'ollama'; known: vllm" in done.err
    assert not out.exists()
    done = run_here(monkeypatch, capsys, *request, "--verify", "transformers")
    assert done.code == 0, done
    verdict = json.loads(done.out)["verdict"]
    assert verdict["passed"]
    assert verdict["checks"][-1]["name"] == "greedy tokens agree"
