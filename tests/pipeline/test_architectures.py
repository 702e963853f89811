"""Every architecture: found, quantized, read back, and close to what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.fixtures import ModelFactory
from support.models import ARCHITECTURES, VOCABULARY, distance, logits, reference_logits
from torch import nn
from transformers import AutoModelForCausalLM

import bitwright

TOKENS = torch.arange(96).reshape(2, 48) * 7 % VOCABULARY
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _report(folder: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads((folder / "quantization_report.json").read_text())
    return report


@every_architecture
def test_an_unquantized_model_computes_exactly_what_transformers_does(
    architecture: str, model_of: ModelFactory
) -> None:
    folder = model_of(architecture)
    model, tokenizer = bitwright.load(folder)
    assert torch.equal(logits(model, TOKENS), reference_logits(folder, TOKENS))
    assert tokenizer.decode(tokenizer("a quick fox")["input_ids"]) == "a quick fox"


@every_architecture
def test_eight_bits_are_close(architecture: str, model_of: ModelFactory, tmp_path: Path) -> None:
    folder, out = model_of(architecture), tmp_path / "out"
    bitwright.quantize(folder, out, scheme="W8A16", group_size=32)
    model, _ = bitwright.load(out)
    assert distance(logits(model, TOKENS), reference_logits(folder, TOKENS)) < 0.05


@every_architecture
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_four_bits_work_and_every_linear_is_accounted_for(
    architecture: str, method: str, model_of: ModelFactory, text: Path, tmp_path: Path
) -> None:
    folder, out = model_of(architecture), tmp_path / "out"
    result = bitwright.quantize(
        folder,
        out,
        method=method,
        group_size=32,
        calibration=str(text) if method == "gptq" else None,
        samples=16,
        sequence_length=64,
    )
    model, _ = bitwright.load(out)
    found = logits(model, TOKENS)
    assert bool(torch.isfinite(found).all())
    assert 0.001 < distance(found, reference_logits(folder, TOKENS)) < 0.6

    report = _report(out)
    original = AutoModelForCausalLM.from_pretrained(folder)
    linears = sum(isinstance(module, nn.Linear) for module in original.modules())
    counts = report["linears"]
    assert isinstance(counts, dict)
    assert counts["found"] == counts["quantized"] + counts["ignored"] == linears
    rows = report["layers"]
    assert isinstance(rows, list)
    assert len({row["name"] for row in rows}) == len(rows) == linears
    packed = _packed(out)
    assert {row["name"] for row in rows if "ignored" not in row} == packed
    assert counts["quantized"] == len(packed) > 0
    for row in rows:
        if "ignored" not in row:
            assert row["measured"] == ("output" if method == "gptq" else "weight")
            assert 0 < row["error"] < 0.05
            assert row["method"] == method
    assert json.loads(json.dumps(result.to_json())) == report


def _packed(folder: Path) -> set[str]:
    names = {name for file in folder.glob("*.safetensors") for name in load_file(file)}
    return {n.removesuffix(".weight_packed") for n in names if n.endswith(".weight_packed")}
