"""A quantized model as the model of quantize: dequantized, rounded again, and said so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import run_here
from support.models import logits

import bitwright
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import load_model

TOKENS = torch.arange(3, 40)[None]
MADE: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"scheme": "W4A16-KV8-FP8", "group_size": 32, "asymmetric": True,
                           "samples": 4, "sequence_length": 32},
    "gptq": {"scheme": "W4A16", "group_size": 32},
    "awq": {"scheme": "W4A16", "group_size": 32, "asymmetric": True},
    "fp8": {"scheme": "W8A8-FP8", "granularity": "tensor"},
    "modelopt": {"scheme": "NVFP4A16"},
    "gguf": {"scheme": "W4A16"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("fmt", MADE)
def test_every_format_is_quantized_again(
    fmt: str, model_of: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    bitwright.quantize(model_of("llama"), first, format=fmt, **MADE[fmt])
    report = bitwright.quantize(
        first, again, scheme="W8A16", method="gptq", group_size=32, calibration=str(text),
        samples=8, sequence_length=32,
    )  # fmt: skip
    assert any("quantized already" in note and fmt in note for note in report.plan.notes)
    found, source = open_checkpoint(again), open_checkpoint(again).config
    assert source["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8
    assert source["quantization_config"]["kv_cache_scheme"] is None
    assert not any(name.endswith(("k_scale", "qweight", "_scale_2")) for name in found.tensors)
    before = bitwright.load(first)[0].float()
    for module in before.modules():
        module._forward_pre_hooks.clear()  # inputs are no longer rounded
    after = load_model(found, dtype=torch.float32)
    expected, now = logits(before, TOKENS), logits(after, TOKENS)
    assert 0 < float((expected - now).norm() / expected.norm()) < 0.1


def test_a_model_of_its_own_codes_is_exact(model_of: Callable[..., Path], tmp_path: Path) -> None:
    """Rounding to 8 bits of the same groups keeps 4-bit codes; the biases go along."""
    first, again = tmp_path / "first", tmp_path / "again"
    bitwright.quantize(model_of("qwen2"), first, format="gptq", group_size=32)
    bitwright.quantize(first, again, format="gptq", group_size=32, search="absmax")
    before, after = (load_model(open_checkpoint(f), dtype=torch.float32) for f in (first, again))
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(before.get_parameter(bias), after.get_parameter(bias))


def test_the_command_says_so(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bitwright.quantize(llama, tmp_path / "first", format="gptq", group_size=32)
    ran = run_here(monkeypatch, capsys, "quantize", tmp_path / "first", tmp_path / "again")
    assert ran.code == 0, ran.err
    assert "quantized already (gptq)" in " ".join(ran.err.split())
