"""GGUF files: what is in them, that transformers reads them, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize as gguf_dequantize
from support.models import SENTENCES, distance, logits, make_model
from transformers import AutoTokenizer

import bitwright
from bitwright.api_convert import convert
from bitwright.errors import BadRequest
from bitwright.evaluation.weights_check import rescaled_error
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.gguf_export import row_order
from bitwright.runtime.gguf_metadata import architecture
from bitwright.runtime.load import load_model, stored_config

TOKENS = torch.arange(3, 60)[None]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = GGUFReader(folder / "model.gguf")
    return {
        tensor.name: torch.from_numpy(gguf_dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "request_",
    [
        {"scheme": "W4A16"},
        {"scheme": "W4A16", "asymmetric": True},
        {"scheme": "W4A16", "group_size": -1},
        {"scheme": "W8A16"},
    ],
    ids=["Q4_0", "Q4_1", "Q4_0-channel", "Q8_0"],
)
def test_a_file_holds_the_codes_and_transformers_computes_with_them(
    architecture: str,
    request_: dict[str, Any],
    model_of: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = model_of(architecture)
    if architecture == "qwen3":  # transformers reads no other head_dim from a file of this type
        model = make_model(tmp_path / "model", "qwen3", head_dim=128)
    bitwright.quantize(model, tmp_path / "out", format="gguf", **request_)
    assert {p.name for p in tmp_path.iterdir()} <= {"model", "out"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "model.gguf", "quantization_report.json",
    ]  # fmt: skip
    bitwright.quantize(model, tmp_path / "twin", format="gptq", **{"group_size": 32} | request_)
    twin = load_model(open_checkpoint(tmp_path / "twin"), dtype=torch.float32)
    found = tensors_of(tmp_path / "out")
    down = found["blk.1.ffn_down.weight"]
    key, expected = found["blk.0.attn_k.weight"], twin.model.layers[0].self_attn.k_proj.weight
    if architecture == "llama":
        expected = expected[row_order(32, 2)]
    tolerance = 2e-3 if "asymmetric" in request_ else 0.0  # offsets are rounded to float16
    assert distance(down, twin.model.layers[1].mlp.down_proj.weight) <= tolerance
    assert distance(key, expected) <= tolerance
    assert torch.equal(found["output_norm.weight"], twin.model.norm.weight)
    read, tokenizer = bitwright.load(tmp_path / "out")
    assert distance(logits(read.float(), TOKENS), logits(twin, TOKENS)) < 0.03
    for sentence in SENTENCES:
        own = AutoTokenizer.from_pretrained(model)(sentence)["input_ids"]
        assert tokenizer(sentence)["input_ids"] == own


def test_rows_of_a_rotated_pair_become_neighbours() -> None:
    assert row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_converted_codes_are_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"scheme": "W4A16", "group_size": 32}
    bitwright.quantize(llama, tmp_path / "gptq", format="gptq", **request)
    bitwright.quantize(llama, tmp_path / "gguf" / "same", format="gguf", **request)
    done = convert(tmp_path / "gptq", tmp_path / "same", format="gguf")
    assert done.requantized == {}
    same = [folder / "same" / "model.gguf" for folder in (tmp_path, tmp_path / "gguf")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_an_unquantized_model_is_written_as_it_is(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", dtype=torch.bfloat16)
    convert(model, tmp_path / "out", format="gguf")
    found, source = tensors_of(tmp_path / "out"), open_checkpoint(model)
    stored = source.read(source.tensors)
    assert torch.equal(found["output.weight"], stored["lm_head.weight"].float())
    assert len(found) == len(stored)


def test_metadata_and_tokenizer(llama: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", vocab_size=330, tie_word_embeddings=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    convert(model, tmp_path / "out", format="gguf")
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.chat_template"] == template
    assert fields["tokenizer.ggml.eos_token_id"] == 0
    assert len(fields["tokenizer.ggml.tokens"]) == 330
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD329]"
    assert fields["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_llama3_scaling_is_a_tensor_of_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = make_model(tmp_path / "model", rope_parameters=rope)
    convert(model, tmp_path / "out", format="gguf")
    divisors = tensors_of(tmp_path / "out")["rope_freqs.weight"]
    assert divisors.shape == (8,)
    assert float(divisors[0]) == pytest.approx(1.0)
    assert float(divisors[-1]) == pytest.approx(8.0)
    assert 1 < float(divisors[1]) < 8


def _edit(model: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((model / file).read_text())
    change(value)
    (model / file).write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("file", "change", "why"),
    [
        ("config.json", {"hidden_act": "gelu"}, "gelu"),
        ("config.json", {"model_type": "gpt_neox"}, "gpt_neox"),
        ("config.json", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4,
                                             "factor": 2.0}}, "dynamic"),
        ("tokenizer.json", {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_compute_differently_is_refused_before_any_work(
    file: str, change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    _edit(model, file, lambda value: value.update(change))
    if change.get("model_type") is None:
        with pytest.raises(BadRequest, match=why):
            bitwright.prepare(model, format="gguf")
    with pytest.raises(BadRequest, match=why):
        convert(model, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


def test_a_model_with_unknown_tensors_is_refused(model_of: Callable[..., Path]) -> None:
    with pytest.raises(BadRequest, match="gemma3_text"):
        architecture(open_checkpoint(model_of("gemma3")))


def test_an_existing_output_is_kept(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for verb in (
        lambda: bitwright.quantize(llama, tmp_path / "out", format="gguf"),
        lambda: convert(llama, tmp_path / "out", format="gguf"),
    ):
        with pytest.raises(BadRequest, match="--overwrite"):
            verb()
    bitwright.quantize(llama, tmp_path / "out", format="gguf", overwrite=True)
    assert (tmp_path / "out" / "model.gguf").stat().st_size > 50_000
    assert stored_config(open_checkpoint(llama)) == {}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_k_types_by_every_method_with_fallbacks_for_odd_widths(
    method: str, text: Path, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 160, "initializer_range": 0.06}
    model = make_model(tmp_path / "model", **sizes)
    bitwright.quantize(
        model, tmp_path / "out", scheme="Q4_K", format="gguf", method=method,
        calibration=None if method == "rtn" else str(text), samples=8, sequence_length=32,
    )  # fmt: skip
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.1.ffn_down.weight"] == "Q5_0"  # 256 does not divide its width of 160
    assert kinds["output.weight"] == "F32"
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    schemes = {row["name"]: row["scheme"] for row in report["layers"]}
    assert schemes["model.layers.0.self_attn.q_proj"] == "Q4_K"
    assert schemes["model.layers.0.mlp.down_proj"] == "W5A16"
    assert any("fallback" in note for note in report["notes"])
    original = load_model(open_checkpoint(model), dtype=torch.float32)
    read, _ = bitwright.load(tmp_path / "out")
    largest = 0.09 if method == "rtn" else 0.3  # gptq moves weights to make up for others
    for name in schemes.keys() - {"lm_head"}:
        weights = (network.get_submodule(name).weight.float() for network in (read, original))
        assert 0.01 < rescaled_error(*weights) < largest, name


def test_k_types_belong_to_gguf_and_have_no_scales_to_tune(llama: Path) -> None:
    requests: list[tuple[dict[str, Any], str]] = [
        ({"format": "gptq"}, "--format gguf"),
        ({"format": "gguf", "method": "gptq+tune"}, "tuning"),
        ({"format": "gguf", "method": "obq"}, "obq"),
        ({"format": "gguf", "asymmetric": True}, "--asymmetric"),
        ({"format": "gguf", "group_size": 64}, "--group-size"),
    ]
    for request, why in requests:
        with pytest.raises(BadRequest, match=why):
            bitwright.prepare(llama, scheme="Q6_K", **request)
