"""Mixed precision through the pipeline: budgets, fused layers, formats, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model
from transformers import AutoModelForCausalLM

from bitwright.api import evaluate, execute, inspect, load, prepare, resolve
from bitwright.api_allocate import mixed_precision
from bitwright.errors import BadRequest
from bitwright.pipeline.sensitivity import sensitivities
from bitwright.pipeline.topology import discover
from bitwright.schemes.scheme import parse_scheme


def bits_of(folder: Path) -> dict[str, str]:
    """Scheme by layer of a checkpoint."""
    return {row["name"]: row["scheme"] for row in inspect(folder)["tensors"]}


@pytest.mark.parametrize("method", ["rtn", "awq+gptq"])
def test_the_mean_is_kept_and_shared_inputs_share_a_width(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    prepared = prepare(llama, scheme="W4A16", method=method, group_size=32,
                       calibration=str(text), samples=8, sequence_length=32)  # fmt: skip
    mixed, found = mixed_precision(prepared, target_bits=4.5)
    assert mixed.plan.bits_per_weight == pytest.approx(found.size / sum(
        layer.shape[0] * layer.shape[1] for layer in mixed.plan.quantized.values()))  # fmt: skip
    assert 4.0 < mixed.plan.bits_per_weight <= 4.5
    assert 0 <= found.gap < 0.5
    assert mixed.plan.fingerprint != prepared.plan.fingerprint
    report = execute(mixed, tmp_path / "out")
    schemes = {row.name: row.scheme for row in report.layers if not row.ignored}
    assert len(set(schemes.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({schemes[f"{block}.self_attn.{p}_proj"] for p in "qkv"}) == 1
        assert schemes[f"{block}.mlp.gate_proj"] == schemes[f"{block}.mlp.up_proj"]
    assert evaluate(tmp_path / "out", text=str(text), windows=2, sequence_length=32).perplexity > 1
    ours = load(tmp_path / "out")[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(input_ids=tokens).logits, ours.float()(input_ids=tokens).logits,
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip


def test_a_limit_on_divergence_takes_fewer_bits_when_it_is_looser(llama: Path, text: Path) -> None:
    prepared = prepare(llama, group_size=32, calibration=str(text), method="gptq", samples=4,
                       sequence_length=32)  # fmt: skip
    tight, loose = (
        mixed_precision(prepared, max_kl=limit)[0].plan.bits_per_weight for limit in (0.01, 0.2)
    )
    assert loose < tight


def test_estimates_fall_with_bits_and_name_every_layer(llama: Path, text: Path) -> None:
    source = resolve(llama)
    topology = discover(source)
    names = [name for block in topology.linears for name in block]
    specs = [parse_scheme(f"W{b}A16").with_weight(group_size=32).weight for b in (2, 4, 8)]
    costs, together = sensitivities(
        source, topology, torch.randint(300, (4, 32)), dict.fromkeys(names, specs), seed=0
    )
    assert sorted(costs) == sorted(names)
    assert sorted(name for group in together for name in group) == sorted(names)
    assert [len(group) for group in together] == [3, 1, 2, 1] * 2
    for values in costs.values():
        assert values[0] > 4 * values[1] > 16 * values[2] > 0


def test_sixteen_bits_where_a_runtime_holds_only_one_width(tmp_path: Path, text: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    request: dict[str, Any] = {"calibration": str(text), "samples": 4, "sequence_length": 32,
                               "group_size": 32, "method": "gptq"}  # fmt: skip
    prepared = prepare(model, runtime="vllm-cpu", **request)
    with pytest.raises(BadRequest, match="--choices may name 16"):
        mixed_precision(prepared, target_bits=6, runtime="vllm-cpu")
    mixed, _ = mixed_precision(prepared, target_bits=8, runtime="vllm-cpu", choices=[4, 16])
    kept = [layer for layer in mixed.plan.layers if layer.ignored.startswith("16 bits")]
    assert kept
    report = execute(mixed, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert {layer.name for layer in kept} < set(config["ignore"])
    assert len(report.plan.layers) == len(report.layers)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        ({}, "either"),
        ({"target_bits": 4, "max_kl": 1}, "either"),
        ({"target_bits": 1.5}, "smallest"),
        ({"max_kl": 1e-12}, "best choices"),
        ({"target_bits": 4, "choices": [4, 9]}, "9 is not"),
    ],
)
def test_impossible_limits_are_refused(llama: Path, limits: dict[str, Any], match: str) -> None:
    prepared = prepare(llama, group_size=32, method="rtn")
    with pytest.raises(BadRequest, match=match):
        mixed_precision(prepared, **limits)


def test_float_weights_have_no_widths_to_mix(llama: Path) -> None:
    with pytest.raises(BadRequest, match="integers"):
        mixed_precision(prepare(llama, scheme="NVFP4A16"), target_bits=4)
