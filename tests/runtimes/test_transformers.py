"""Checkpoints in transformers with compressed-tensors installed, against bitwright's own load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import bitwright
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import load_model

pytestmark = pytest.mark.runtime

TOKENS = torch.arange(3, 51)[None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("group_size", [32, -1], ids=["group", "channel"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_form_loads(
    bits: int, asymmetric: bool, group_size: int, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    bitwright.quantize(
        tiny, out, scheme=f"W{bits}A16", asymmetric=asymmetric, group_size=group_size
    )
    assert_same_logits(out)


def test_the_real_model_loads(smollm2: Path, tmp_path: Path, note: Callable[[str], None]) -> None:
    out = tmp_path / "out"
    bitwright.quantize(smollm2, out, scheme="W4A16")
    note(f"transformers, SmolLM2 W4A16: largest logit difference {assert_same_logits(out):.2g}")


def assert_same_logits(folder: Path) -> float:
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    own = load_model(open_checkpoint(folder))
    with torch.no_grad():
        expected, found = own(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits
    difference = float((expected.float() - found.float()).abs().max())
    assert difference <= 1e-3 * float(expected.float().abs().max())
    return difference
