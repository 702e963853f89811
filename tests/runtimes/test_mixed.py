"""Checkpoints with a bit width per layer, in the runtimes that are to load them.

Two blocks of the real model: enough for several widths, few enough to estimate in seconds.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from support.cli import run_apart

from bitwright.api import load_tokenizer, resolve
from bitwright.evaluation.verify import verify
from bitwright.runtime.load import load_model

pytestmark = pytest.mark.runtime

BLOCKS = 2


@pytest.fixture(scope="module")
def blocks(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model with only the first of its blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "model"
    model = load_model(resolve(smollm2))
    model.model.layers = model.model.layers[:BLOCKS]
    model.config.num_hidden_layers = BLOCKS
    model.save_pretrained(folder)
    load_tokenizer(resolve(smollm2)).save_pretrained(folder)
    return folder


def _quantize(model: Path, out: Path, *options: object) -> None:
    ran = run_apart("quantize", model, out, "--method", "rtn", *options, "--quiet")
    assert (ran.code, ran.err) == (0, "")


def _verified(
    out: Path, runtime: str, interpreter: Path, note: Callable[[str], None], widths: str
) -> None:
    verdict = verify(out, runtime=runtime, python=interpreter)
    note(f"{runtime}, {widths}: {verdict.checks[-2].detail}")
    assert verdict.passed, verdict.checks[-1]


def test_llama_cpp_runs_a_type_per_tensor(
    blocks: Path, llamacpp_interpreter: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    _quantize(blocks, tmp_path / "q", "--target-bits", 6, "--format", "gguf")
    tensors = GGUFReader(tmp_path / "q" / "model.gguf").tensors
    kinds = {t.name: t.tensor_type.name for t in tensors if t.name.startswith("blk.")}
    used = set(kinds.values()) - {"F32"}
    assert len(used) > 1
    assert used <= {"Q4_0", "Q5_0", "Q8_0"}
    for block in range(BLOCKS):
        assert len({kinds[f"blk.{block}.attn_{p}.weight"] for p in "qkv"}) == 1
    _verified(tmp_path / "q", "llama.cpp", llamacpp_interpreter, note, " and ".join(sorted(used)))


def test_vllm_runs_layers_of_4_bits_beside_layers_of_16(
    blocks: Path, vllm_interpreter: Path, tmp_path: Path, note: Callable[[str], None]
) -> None:
    options = ("--target-bits", 8, "--choices", "4,16", "--for", "vllm-cpu")
    _quantize(blocks, tmp_path / "q", *options)
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    kept = [name for name in config["ignore"] if name.startswith("model.layers.")]
    assert 0 < len(kept) < 7 * BLOCKS
    _verified(tmp_path / "q", "vllm", vllm_interpreter, note, f"{len(kept)} Linears in 16 bits")
