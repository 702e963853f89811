"""Whole runs in every format: the same weights come back, also under older key spellings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import logits

import bitwright
from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.formats import get_format
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.runtime.load import format_of, load_model
from bitwright.schemes.quantized import dequantize

TOKENS = torch.arange(3, 40)[None]
CASES: dict[str, dict[str, Any]] = {
    "gptq": {"format": "gptq", "group_size": 32},
    "gptq-v2": {"format": "gptq", "group_size": -1, "asymmetric": True, "scheme": "W3A16"},
    "awq": {"format": "awq", "group_size": 32, "asymmetric": True},
}


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("formats")
    for case, request in CASES.items():
        bitwright.quantize(llama, folder / case, **request)
    return {case: folder / case for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_run_writes_float16_scales_that_load_uses_as_they_are(
    case: str, made: dict[str, Path]
) -> None:
    folder = made[case]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    source = open_checkpoint(folder)
    tensors = source.read(source.tensors)
    fmt = get_format(config["quant_method"])
    assert (folder / "quantize_config.json").exists() == (fmt.name == "gptq")
    names = fmt.quantized_names(set(tensors))
    assert len(names) == 14
    model = load_model(source, dtype=torch.float32)
    for name in names:
        assert tensors[f"{name}.scales"].dtype is torch.float16
        q = fmt.decode(name, tensors, config)
        assert torch.equal(model.get_submodule(name).weight, dequantize(q))
    found = bitwright.inspect(folder)
    assert found["format"] == fmt.name
    assert list(found["left_alone"]) == ["lm_head"]


@pytest.mark.parametrize("case", ["gptq", "awq"])
def test_older_spellings_of_the_config_are_understood(
    case: str, made: dict[str, Path], tmp_path: Path
) -> None:
    expected = logits(load_model(open_checkpoint(made[case])), TOKENS)
    folder = tmp_path / "old"
    folder.mkdir()
    for path in made[case].iterdir():
        if path.name != "quantize_config.json":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    stored = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="no quantization_config"):
        format_of(open_checkpoint(folder))
    if case == "gptq":
        kept = ("bits", "group_size", "desc_act", "sym")
        old, file = {key: stored[key] for key in kept}, "quantize_config.json"
    else:
        old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        file = "quant_config.json"
    (folder / file).write_text(json.dumps(old))
    assert torch.equal(logits(load_model(open_checkpoint(folder)), TOKENS), expected)
    assert "quantized already" in bitwright.prepare(folder).plan.notes[-1]


def test_shapes_are_refused_before_any_work(llama: Path) -> None:
    with pytest.raises(BadRequest, match=r"layers\.0.*--asymmetric"):
        bitwright.prepare(llama, format="awq", group_size=32)
    with pytest.raises(BadRequest, match=r"layers\.0.*W5A16"):
        bitwright.prepare(llama, format="gptq", scheme="W5A16", group_size=32)
