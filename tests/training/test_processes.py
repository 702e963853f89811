"""Training in two processes (torchrun, FSDP2 on gloo) against one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.models import make_model
from support.training import ALONE, SMALL, Job, divergence_of, run_jobs

from bitwright import train
from bitwright.errors import BadRequest
from bitwright.methods.rtn import rtn
from bitwright.schemes.scheme import parse_scheme
from bitwright.training.processes import Processes, splits, start_processes

posix = pytest.mark.skipif(os.name != "posix", reason="gloo and torchrun")
pytestmark = pytest.mark.usefixtures("one_thread")

# what learns, how weights, inputs and cache are rounded, and what FSDP has to leave whole
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cache, recomputed": (
        "llama",
        {"scheme": "W4A8KV4", "learn": "all", "group_size": 32, "gradient_checkpointing": True},
    ),
    "bfloat16": ("bfloat16", {"scheme": "W4A16", "learn": "all", "group_size": 32}),
    "minmax": ("llama", {"scheme": "W4A16", "init": "rtn", "learn": "all", "group_size": 32}),
    "lsq": (
        "llama",
        {"scheme": "W4A16", "learn": "all", "step_sizes": "lsq", "group_size": 32,
         "asymmetric": True, "teacher_top": 20},
    ),
    "float scales": ("llama", {"scheme": "NVFP4", "init": "gptq"}),
    "searched global scales": ("llama", {"scheme": "NVFP4", "init": "rtn", "learn": "all"}),
    "tensors": ("llama", {"scheme": "W8A8-FP8", "init": "rtn", "granularity": "tensor"}),
    "biases": ("qwen2", {"scheme": "W4A16", "group_size": 32}),
    "experts": ("mixtral", {"scheme": "W4A16", "init": "rtn", "learn": "all", "group_size": 32}),
}  # fmt: skip


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = folder.glob("*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


@posix
def test_two_processes_learn_what_one_does(model_of: Any, text: Path, tmp_path: Path) -> None:
    half = make_model(tmp_path / "bfloat16", dtype=torch.bfloat16, tie_word_embeddings=True)
    jobs: list[Job] = []
    for index, (kind, options) in enumerate(CASES.values()):
        model = half if kind == "bfloat16" else model_of(kind)
        jobs.append((model, tmp_path / f"two-{index}", {"data": str(text), **SMALL, **options}))
    code, errors = run_jobs(jobs, tmp_path, processes=2)
    assert code == 0, errors[-3000:]
    for name, (model, two, keywords) in zip(CASES, jobs, strict=True):
        one = tmp_path / "one"
        _, outcome = train(model, one, **keywords, overwrite=True)
        found = json.loads(Path(f"{two}.json").read_text(encoding="utf-8"))
        assert found["losses"] == pytest.approx(outcome.losses, rel=1e-3), name
        for mine, other in zip(outcome.curve, found["curve"], strict=True):
            assert other == pytest.approx(mine, rel=1e-3), name
        if "teacher_top" not in keywords:  # bit for bit
            assert divergence_of(two, model, text) == found["best"], name
        expected, got = stored(one), stored(two)
        assert expected.keys() == got.keys()
        for tensor, value in expected.items():
            assert torch.equal(value, got[tensor]), f"{name}: {tensor}"


@posix
def test_two_killed_processes_go_on_to_the_same_result(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    options = {"data": str(text), "scheme": "W4A16", "learn": "all", "group_size": 32,
               **SMALL, "steps": 10}  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    jobs: list[Job] = [(llama, whole, options), (llama, out, options | {"die_at": 7})]
    code, errors = run_jobs(jobs, tmp_path, processes=2)
    assert code != 0
    assert "SIGKILL" in errors
    assert not out.exists()
    left = tmp_path / ".out.training" / "state-6"
    parts = []
    for rank in (0, 1):  # each has half of every leaf and of its moments
        with safe_open(left / f"{rank}.safetensors", framework="pt") as handle:
            names = list(handle.keys())
            parts.append({name: handle.get_slice(name).get_shape() for name in names})
    assert parts[0] == parts[1]
    name = next(name for name in parts[0] if "q_proj" in name and name.endswith("/code"))
    assert parts[0][name] == [32, 64]
    assert parts[0][name.replace("leaf:", "exp_avg:")] == [32, 64]
    with pytest.raises(BadRequest, match="begun with train"):  # by two processes
        train(llama, out, **options, resume=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node=2", "-m", "bitwright.cli"]  # fmt: skip
    words = ["train", llama, out, "--data", text, "--train", "all", "--group-size", 32, "--steps",
             10, "--samples", 12, "--sequence-length", 32, "--batch-tokens", 64, "--check-every", 2,
             "--calibration-samples", 8, "--resume", "--json"]  # fmt: skip
    done = subprocess.run(
        [*launcher, *map(str, words)],
        capture_output=True, text=True, env=os.environ | ALONE, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["training"]  # the first process speaks for both
    first = json.loads(Path(f"{whole}.json").read_text(encoding="utf-8"))
    assert (found["curve"], found["held_out_best"]) == (first["curve"], first["best"])
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_rows_that_share_scales_stay_together() -> None:
    weight = torch.randn(64, 64)

    def alone(scheme: str, *, searched: bool = False, **changes: Any) -> bool:
        spec = parse_scheme(scheme).with_weight(**changes).weight
        return splits(rtn(weight, None, spec), searched=searched)

    assert alone("W4A16", group_size=32)
    assert alone("NVFP4A16")
    assert not alone("NVFP4A16", searched=True)
    assert alone("MXFP4", searched=True)
    for rows, count in ((64, 2), (9, 2), (3, 2), (5, 4), (2, 4)):
        parts = [Processes(rank=rank, count=count).part(rows) for rank in range(count)]
        together = torch.cat([torch.arange(rows)[part] for part in parts])
        assert torch.equal(together, torch.arange(rows))
        for part, chunk in zip(parts, torch.arange(rows).chunk(count), strict=False):
            assert torch.equal(torch.arange(rows)[part], chunk)  # as FSDP has them


def test_devices_that_are_not_there() -> None:
    assert start_processes("cpu").device == torch.device("cpu")
    with pytest.raises(BadRequest, match="unknown device"):
        start_processes("tpu")
    if not torch.cuda.is_available():
        assert start_processes("auto").device == torch.device("cpu")
        with pytest.raises(BadRequest, match="no CUDA device"):
            start_processes("cuda")
