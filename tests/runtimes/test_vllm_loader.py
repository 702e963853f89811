"""fp8, modelopt and gpt-oss checkpoints in vLLM's own loader; a CPU has no kernels for them."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_model

import bitwright
from bitwright.evaluation.verify import SETTINGS
from bitwright.pipeline.checkpoint import open_checkpoint

pytestmark = pytest.mark.runtime

CALIBRATED = {"samples": 4, "sequence_length": 32}
STATIC = {"granularity": "tensor", "activations": "static"} | CALIBRATED
CASES: dict[str, dict[str, Any]] = {
    "fp8 tensor": {"format": "fp8", "scheme": "W8A8-FP8", "granularity": "tensor"},
    "fp8 static": {"format": "fp8", "scheme": "W8A8-FP8", **STATIC},
    "fp8 block": {"format": "fp8", "scheme": "W8A8-FP8", "granularity": "block"},
    "FP8": {"format": "modelopt", "scheme": "W8A8-FP8-KV8-FP8", **STATIC},
    "FP8_PB_WO": {"format": "modelopt", "scheme": "W8A8-FP8", "granularity": "block"},
    "NVFP4": {"format": "modelopt", "scheme": "NVFP4", **CALIBRATED},
    "W4A16_NVFP4": {"format": "modelopt", "scheme": "NVFP4A16"},
}
SECONDS = 900
STACKED = "gpt-oss"
PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.down_proj": ("mlp.down_proj",),
}


def stored_bytes(folder: Path, tensors: list[str]) -> int:
    """Sum of all bytes of some tensors, which no order of rows or merging changes."""
    values = open_checkpoint(folder).read(tensors).values()
    return sum(int(v.contiguous().flatten().view(torch.uint8).sum()) for v in values)


def check_experts(folder: Path, answer: dict[str, Any]) -> None:
    """Every parameter of the stacks is loaded, and holds what all experts store."""
    owner = "model.layers.0.mlp.experts"
    experts = [name for name in answer["facts"] if name.startswith(f"{owner}.routed_experts.")]
    leaves = {name.rpartition(".")[2] for name in experts}
    wanted = {
        f"{m}_{part}" for m in ("w13", "w2") for part in ("weight_packed", "weight_scale", "bias")
    }
    assert wanted <= leaves
    assert not {f"{owner}.routed_experts.{leaf}" for leaf in wanted} & set(answer["unloaded"])
    for leaf in wanted:
        matrix, _, part = leaf.partition("_")
        stored = stored_bytes(folder, [f"{owner}.{e}.{matrix}.{part}" for e in range(4)])
        assert stored == answer["facts"][f"{owner}.routed_experts.{leaf}"][2], leaf


def test_every_tensor_finds_its_parameter(
    vllm_interpreter: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    model = make_model(
        tmp_path / "model", dtype=torch.bfloat16, hidden_size=256, intermediate_size=256,
        num_key_value_heads=4,
    )  # fmt: skip
    for name, request in CASES.items():
        bitwright.quantize(model, tmp_path / name, **request)
    stacked = make_model(
        tmp_path / "stacked",
        "gpt-oss",
        dtype=torch.bfloat16,
        hidden_size=256,
        intermediate_size=128,
    )
    bitwright.quantize(stacked, tmp_path / STACKED, scheme="W4A16", group_size=32)
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [vllm_interpreter, Path(__file__).with_name("load_in_vllm.py"),
         *(tmp_path / name for name in (STACKED, *CASES))],
        env=outside | SETTINGS, text=True, capture_output=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    check_experts(tmp_path / STACKED, answers.pop(0))
    compared = 0
    for name, answer in zip(CASES, answers, strict=True):
        folder, cached = tmp_path / name, name == "FP8"
        unloaded = {key.rpartition(".")[2] for key in answer["unloaded"]}
        allowed = {"q_scale", "prob_scale"} | (set() if cached else {"k_scale", "v_scale"})
        if name == "W4A16_NVFP4":  # vLLM has the parameter, the format no such tensor
            allowed |= {"input_scale"}
        assert unloaded <= allowed, name
        stored = open_checkpoint(folder).tensors
        for parameter, (_, _, total) in answer["facts"].items():
            layer, _, leaf = parameter.removeprefix("model.layers.0.").rpartition(".")
            if layer == "self_attn.attn" or leaf in unloaded:
                continue
            tensors = [f"model.layers.0.{part}.{leaf}" for part in PARTS[layer]]
            assert set(tensors) <= stored.keys(), (name, parameter)
            assert stored_bytes(folder, tensors) == total, (name, parameter)
            compared += 1
        if cached:
            scale = "model.layers.0.self_attn.k_proj.k_scale"
            found = answer["facts"]["model.layers.0.self_attn.attn.k_scale"][2]
            assert stored_bytes(folder, [scale]) == found
    note(f"vLLM's loader: {compared} parameters of {len(CASES)} fp8 and modelopt checkpoints "
         "hold the stored bytes")  # fmt: skip
