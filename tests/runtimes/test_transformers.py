"""Checkpoints in transformers with compressed-tensors installed, against bitwright's own load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import make_model
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


LOW_BIT = {
    "fp8": {"scheme": "W8A8-FP8"},
    "fp8-static": {"scheme": "W8A8-FP8", "activations": "static"},
    "fp8-tensor": {"scheme": "W8A8-FP8", "granularity": "tensor", "activations": "static"},
    "fp8-block": {"scheme": "W8A8-FP8", "granularity": "block", "method": "rtn"},
    "int8-static": {"scheme": "W8A8-INT8", "activations": "static", "input_range": "mse"},
    "w4a8-fp8": {"scheme": "W4A8-FP8", "group_size": 32},
    "w4a4": {"scheme": "W4A4", "group_size": 32},
}


@pytest.mark.parametrize("case", LOW_BIT)
def test_low_bit_inputs_give_the_same_logits(case: str, text: Path, tmp_path: Path) -> None:
    """In float32, where both round the same numbers: inputs, weights and scales must agree."""
    model = make_model(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256
    )
    request = {"method": "gptq", "calibration": str(text), "samples": 8, "sequence_length": 32}
    bitwright.quantize(model, tmp_path / "out", **(request | LOW_BIT[case]))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    own = load_model(open_checkpoint(tmp_path / "out"), dtype=torch.float32)
    original = load_model(open_checkpoint(model), dtype=torch.float32)
    with torch.no_grad():
        expected, found, before = (m(input_ids=TOKENS).logits for m in (own, theirs, original))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - before).norm() / before.norm()) > 0.02


@pytest.mark.parametrize(
    "scheme", ["W8A8-INT8", "W4A8-INT8", "NVFP4", "NVFP4A16", "MXFP4", "MXFP8"]
)
def test_schemes_whose_input_rounding_is_the_runtime_s(
    scheme: str, text: Path, tmp_path: Path
) -> None:
    """compressed-tensors takes INT8 scales as max / 127.5 and computes FP4 ones in bfloat16.

    The weights must be the same; the logits must be nearer to each other than to the original's.
    """
    model = make_model(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=128, intermediate_size=256
    )
    bitwright.quantize(model, tmp_path / "out", scheme=scheme, method="gptq", samples=8,
                       calibration=str(text), sequence_length=32)  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    own, original = (load_model(open_checkpoint(path)) for path in (tmp_path / "out", model))
    with torch.no_grad():
        expected, found, before = (
            m(input_ids=TOKENS).logits.float() for m in (own, theirs, original)
        )
    for name, module in own.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert torch.equal(theirs.get_submodule(name).weight, module.weight), name
    assert float((expected - found).norm()) < 0.75 * float((expected - before).norm())


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
