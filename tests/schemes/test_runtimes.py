"""What is refused for which runtime, before any work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli import run_here

import bitwright
from bitwright.errors import BadRequest, BadShape, UnknownName
from bitwright.formats import FORMATS
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.schemes.runtimes import _table, fused, known_runtimes, require_loadable, spelling
from bitwright.schemes.scheme import parse_scheme

FP8 = parse_scheme("W8A8-FP8")
W4 = parse_scheme("W4A16")
SHAPES = {"layer": (64, 64)}


def test_every_entry_names_a_format_and_says_where_it_comes_from() -> None:
    for runtime, entry in _table().items():
        assert entry["origin"] in ("tested", "read"), runtime
        rest = set(entry) - {
            "origin", "caches", "widths", "rows", "columns", "groups", "merges", "block_rows",
        }  # fmt: skip
        assert rest
        assert rest <= set(FORMATS), runtime


@pytest.mark.parametrize(
    ("runtime", "fmt", "scheme", "says"),
    [
        ("vllm-cpu", "fp8", FP8, "--format compressed-tensors or gptq or awq or modelopt"),
        ("vllm-cpu", "compressed-tensors", parse_scheme("W3A16"), "does not load W3A16"),
        ("vllm-cpu", "gptq", W4.with_weight(asymmetric=True), "does not load W4A16 asymmetric"),
        ("vllm-cpu", "compressed-tensors", FP8.with_granularity("tensor"), "W8A8-FP8 tensor"),
        ("vllm-cpu", "compressed-tensors", FP8.with_activations("static"), "W8A8-FP8 static"),
        ("vllm-cpu", "compressed-tensors", W4.with_kv_cache("int8"), "KV8-INT8 cache"),
        ("vllm-cuda", "gguf", W4, "--format compressed-tensors"),
        ("tensorrt-llm", "compressed-tensors", FP8, "use --format modelopt"),
        ("llama.cpp", "compressed-tensors", W4, "use --format gguf"),
        ("transformers", "modelopt", FP8, "does not load the format modelopt"),
        ("transformers", "fp8", FP8.with_granularity("tensor"), "W8A8-FP8 block"),
        ("sglang", "modelopt", FP8, "W8A8-FP8 tensor static"),
    ],
)
def test_what_a_runtime_cannot_load_is_refused(
    runtime: str, fmt: str, scheme: object, says: str
) -> None:
    with pytest.raises(BadRequest, match=says):
        require_loadable(runtime, fmt, scheme, SHAPES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("runtime", "fmt", "name"),
    [
        ("vllm-cpu", "compressed-tensors", "W4A8-INT8-KV8-FP8"),
        ("vllm-cpu", "modelopt", "W8A8-FP8"),
        ("vllm-cuda", "compressed-tensors", "NVFP4"),
        ("llama.cpp", "gguf", "Q4_K"),
        ("transformers", "compressed-tensors", "W4A4"),
        ("tensorrt-llm", "modelopt", "NVFP4"),
    ],
)
def test_what_a_runtime_loads_is_not_refused(runtime: str, fmt: str, name: str) -> None:
    require_loadable(runtime, fmt, parse_scheme(name), SHAPES)


def test_widths_and_unknown_runtimes() -> None:
    with pytest.raises(BadShape, match="layer: vllm-cpu needs widths in multiples of 32"):
        require_loadable("vllm-cpu", "gptq", W4, {"layer": (48, 64)})
    with pytest.raises(BadShape, match="layer: marlin needs widths in multiples of 64 x 128"):
        require_loadable("marlin", "gptq", W4, {"layer": (64, 576)})
    with pytest.raises(BadRequest, match="marlin does not load group size 256"):
        require_loadable("marlin", "gptq", W4.with_weight(group_size=256), SHAPES)
    require_loadable("marlin", "awq", W4.with_weight(asymmetric=True), {"layer": (192, 384)})
    with pytest.raises(UnknownName, match="known: vllm-cpu, vllm-cuda, marlin, sglang"):
        require_loadable("ollama", "gguf", W4, SHAPES)
    assert known_runtimes()[0] == "vllm-cpu"
    assert spelling(FP8.with_granularity("block")) == "W8A8-FP8 block"


def test_merged_matrices_are_quantized_together_and_meet_at_blocks() -> None:
    names = ("m.0.q_proj", "m.0.k_proj", "m.0.v_proj", "m.0.o_proj")
    shapes = dict.fromkeys(names, (128, 128))
    require_loadable("vllm-cuda", "compressed-tensors", W4, shapes)
    del shapes["m.0.k_proj"]
    with pytest.raises(BadRequest, match=r"m\.0\.k_proj: vllm-cuda merges it with m\.0\.q_proj"):
        require_loadable("vllm-cuda", "compressed-tensors", W4, shapes, ["m.0.k_proj"])
    require_loadable("transformers", "compressed-tensors", W4, shapes, ["m.0.k_proj"])
    block = FP8.with_granularity("block")
    narrow = dict.fromkeys(names, (192, 128))
    with pytest.raises(BadShape, match=r"m\.0\.q_proj: vllm-cuda merges it with m\.0\.v_proj.*128"):
        require_loadable("vllm-cuda", "fp8", block, narrow)
    require_loadable("vllm-cuda", "fp8", block, narrow | dict.fromkeys(names[:2], (256, 128)))


@pytest.mark.parametrize(
    ("request_", "scale"),
    [
        ({"scheme": "W8A8-FP8", "granularity": "tensor", "format": "fp8"}, "weight_scale"),
        ({"scheme": "NVFP4A16", "format": "modelopt"}, "weight_scale_2"),
        ({"scheme": "NVFP4A16"}, "weight_global_scale"),
        ({"scheme": "NVFP4", "samples": 4, "sequence_length": 32}, "weight_global_scale"),
        ({"scheme": "W8A8-INT8", "granularity": "tensor"}, "weight_scale"),
    ],
)
def test_merged_matrices_share_their_scale_with_and_without_calibration(
    request_: dict[str, Any], scale: str, model_of: Callable[..., Path], tmp_path: Path
) -> None:
    bitwright.quantize(model_of("llama"), tmp_path / "out", **request_)
    checkpoint = open_checkpoint(tmp_path / "out")
    names = [name for name in checkpoint.tensors if name.endswith(f".{scale}")]
    stored = {name.removesuffix(f".{scale}"): v for name, v in checkpoint.read(names).items()}
    groups = [group for group in fused(stored) if len(group) > 1]
    assert sorted(map(len, groups)) == [2, 2, 3, 3]
    for group in groups:
        assert all(torch.equal(stored[name], stored[group[0]]) for name in group)
    alone = [stored[g[0]] for g in fused(stored) if len(g) == 1] + [stored[g[0]] for g in groups]
    assert len({float(value) for value in alone}) == 8


def test_the_command_refuses_before_any_work(
    model_of: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    request = ("quantize", model_of("llama"), out, "--scheme", "W3A16", "--group-size", "32")
    done = run_here(monkeypatch, capsys, *request, "--for", "vllm-cpu")
    assert done.code == 2
    assert "vllm-cpu does not load W3A16" in done.err
    assert not out.exists()
    done = run_here(monkeypatch, capsys, *request, "--for", "transformers", "--quiet")
    assert done.code == 0
