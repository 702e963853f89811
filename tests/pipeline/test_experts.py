"""Mixtures of experts: the same function taken apart, every expert quantized, none in silence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from support.models import logits, make_model, reference_logits
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitwright.api import load, quantize
from bitwright.errors import BadRequest, UnsupportedModel
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.experts import Experts, take_apart
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import format_of

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("mixtral", "qwen3-moe", "deepseek-v3", "gpt-oss")
TOKENS = torch.arange(20, 84).view(2, 32)
Factory = Callable[..., Path]


def expert_names(folder: Path) -> set[str]:
    """Stored matrices of experts, routers not included."""
    return {
        name.removesuffix(".weight")
        for name in open_checkpoint(folder).tensors
        if ".experts." in name and name.endswith(".weight")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_taken_apart_the_model_computes_the_same(kind: str, model_of: Factory) -> None:
    model, _ = load(model_of(kind))
    assert any(isinstance(module, Experts) for module in model.modules())
    torch.testing.assert_close(
        logits(model, TOKENS), reference_logits(model_of(kind), TOKENS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq+gptq"])
def test_every_expert_is_quantized_under_its_own_name(
    kind: str, method: str, model_of: Factory, text: Path, tmp_path: Path
) -> None:
    source, out = model_of(kind), tmp_path / "out"
    calibration = {} if method == "rtn" else {"calibration": str(text), "samples": 16}
    quantize(source, out, scheme="W8A16", group_size=32, method=method, sequence_length=32,
             **calibration)  # fmt: skip
    checkpoint = open_checkpoint(out)
    fmt = format_of(checkpoint)
    assert fmt is not None
    done = fmt.quantized_names(set(checkpoint.tensors))
    experts = expert_names(source)
    assert experts
    assert experts <= done
    report = json.loads((out / "quantization_report.json").read_text())
    linears = report["linears"]
    assert linears["found"] == linears["quantized"] + linears["ignored"] == len(report["layers"])
    ignored = {row["name"]: row["ignored"] for row in report["layers"] if "ignored" in row}
    gates = {name for name, reason in ignored.items() if reason == "router"}
    assert gates
    assert gates <= set(checkpoint.config["quantization_config"]["ignore"])
    assert all(f"{name}.weight" in checkpoint.tensors for name in gates)
    model, _ = load(out)
    wanted = reference_logits(source, TOKENS)
    off = (logits(model, TOKENS) - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert float(off.median()) < 0.05  # a near tie of the router may send a few tokens elsewhere


def test_experts_with_few_tokens_say_so(model_of: Factory, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(model_of("qwen3-moe"), out, group_size=32, method="gptq", calibration=str(text),
             samples=1, sequence_length=24)  # fmt: skip
    rows = json.loads((out / "quantization_report.json").read_text())["layers"]
    lent = [row for row in rows if "statistics of all experts" in row.get("fallback", "")]
    assert lent
    assert all(".experts." in row["name"] and "tokens routed here" in row["fallback"]
               for row in lent)  # fmt: skip
    own = [row for row in rows if ".experts." in row["name"] and row not in lent]
    assert all("tokens routed" not in row.get("fallback", "") for row in own)
    assert torch.isfinite(logits(load(out)[0], TOKENS)).all()


def test_experts_get_statistics_of_their_own_tokens(model_of: Factory) -> None:
    """Experts of one layer see different tokens, so their hessians differ."""
    from bitwright.pipeline.calibrate import HiddenStates, collect
    from bitwright.pipeline.inputs import shared_inputs
    from bitwright.pipeline.topology import compute_dtype, load_outside, materialize

    source = open_checkpoint(model_of("mixtral"))
    topology = discover(source)
    load_outside(topology, source)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokens = torch.randint(0, 320, (8, 32))
        hidden = HiddenStates(topology, tokens, Path(folder) / "hidden")
        names = topology.block_tensors(0)
        tensors = source.read(names.values())
        materialize(
            topology.model, {p: tensors[t] for p, t in names.items()}, compute_dtype(source)
        )
        _, first, call = next(hidden.batches(0))
        block, linears = topology.block(0), topology.linears[0]
        shared = shared_inputs(block, linears, first, call)
        found = collect(block, linears, shared, hidden, 0)
        gates = [g for g in shared if g.names[0].endswith("gate_proj")]
        assert len(gates) == 4
        assert all(len(group.names) == 2 for group in gates)  # gate and up share an input
        seen = [found[group] for group in gates]
        assert sum(stats.tokens for stats in seen) == 2 * tokens.numel()  # two experts a token
        assert not torch.allclose(seen[0].hessian_II, seen[1].hessian_II)
        hidden.close()


def test_true_inputs_and_experts_exclude_each_other(model_of: Factory, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="unlike tokens"):
        quantize(model_of("mixtral"), tmp_path / "out", method="gptq", true_inputs=0.5)


def test_layouts_that_are_not_understood_are_refused(model_of: Factory) -> None:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_of("gpt-oss")))
    model.model.layers[1].mlp.experts.has_gate = False
    with pytest.raises(UnsupportedModel, match=r"layers.1.mlp.experts .* taken apart yet"):
        take_apart(model)


def test_stacked_experts_are_named_as_vllm_reads_them(model_of: Factory, tmp_path: Path) -> None:
    """vLLM's gpt-oss takes experts.N.w13_weight_packed, and would pass over other names."""
    quantize(model_of("gpt-oss"), tmp_path / "out", group_size=32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    names = {name for name in index["weight_map"] if ".0.mlp.experts.3." in name}
    stem = "model.layers.0.mlp.experts.3"
    assert names == {
        f"{stem}.{matrix}{part}"
        for matrix in ("w13", "w2")
        for part in ("_weight_packed", "_weight_scale", "_bias", ".weight_shape")
    }


def test_stacks_in_mxfp4_are_read(model_of: Factory, tmp_path: Path) -> None:
    """The layout of the published gpt-oss, against transformers' own reading of it."""
    source, folder = model_of("gpt-oss"), tmp_path / "mxfp4"
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    random = torch.Generator().manual_seed(0)
    wanted = {}
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        count, cols, rows = tensors.pop(name).shape
        codes = torch.randint(0, 256, (count, rows, cols // 32, 16), generator=random)
        scales = torch.randint(118, 126, (count, rows, cols // 32), generator=random)
        tensors[f"{name}_blocks"] = codes.to(torch.uint8)
        tensors[f"{name}_scales"] = scales.to(torch.uint8)
        wanted[name] = convert_moe_packed_tensors(codes.to(torch.uint8), scales.to(torch.uint8))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    stem = "model.layers.1.mlp.experts"
    for old, new in (("gate_up_proj", "w13"), ("down_proj", "w2")):
        for expert in range(4):
            name = f"{stem}.{expert}.{new}.weight"
            assert torch.equal(checkpoint.read([name])[name], wanted[f"{stem}.{old}"][expert].T)
    quantize(folder, tmp_path / "out", scheme="W8A16", group_size=32)
    wanted_logits = logits(load(folder)[0], TOKENS)
    off = (logits(load(tmp_path / "out")[0], TOKENS) - wanted_logits).norm(dim=-1)
    assert float((off / wanted_logits.norm(dim=-1)).median()) < 0.05


def test_experts_train(model_of: Factory, text: Path, tmp_path: Path) -> None:
    from bitwright import train

    options: dict[str, Any] = {"steps": 3, "samples": 8, "sequence_length": 16, "check_every": 3}
    _, outcome = train(model_of("mixtral"), tmp_path / "out", data=str(text), init="rtn",
                       group_size=32, **options)  # fmt: skip
    assert outcome.best <= outcome.before


def test_an_older_spelling_is_read(tmp_path: Path) -> None:
    """Mixtral's files say block_sparse_moe and w1, w2, w3."""
    names = expert_names(make_model(tmp_path / "model", "mixtral"))
    assert any(name.endswith("block_sparse_moe.experts.3.w2") for name in names)
