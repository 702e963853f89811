"""What tests of training share."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bitwright import load
from bitwright.api import resolve
from bitwright.pipeline.texts import calibration_windows, read_text, tokenize
from bitwright.runtime.kv_load import cache_factory
from bitwright.training.distill import divergence
from bitwright.training.qat import Recipe, split_samples

Job = tuple[Path, Path, dict[str, Any]]  # model, output, keywords of `train`
ALONE = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
SMALL: dict[str, Any] = {
    "steps": 4, "samples": 12, "sequence_length": 32, "batch_tokens": 64, "check_every": 2,
    "calibration_samples": 8,
}  # fmt: skip


def divergence_of(model: Path, original: Path, text: Path) -> float:
    """What training calls held-out divergence, through the checkpoint as anyone would load it."""
    network, tokenizer = load(model)
    teacher, _ = load(original)
    new_cache = cache_factory(resolve(model), network)
    tokens, _ = calibration_windows(tokenize(tokenizer, read_text(str(text))), 12, 32, 0)
    judges, _ = split_samples(12, Recipe(4, 2, {}))
    total = 0.0
    with torch.no_grad():
        for sample in judges:
            extra: dict[str, Any] = {"use_cache": False}
            if new_cache is not None:
                extra = {"past_key_values": new_cache(), "use_cache": True}
            logits = network(input_ids=tokens[sample][None], **extra).logits[0]
            target = teacher(input_ids=tokens[sample][None], use_cache=False).logits[0]
            total += float(divergence(logits, target))
    return total / len(judges)


def run_jobs(jobs: list[Job], folder: Path, *, processes: int = 1) -> tuple[int, str]:
    """Train in processes of their own (see train_driver.py): (exit code, errors)."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([[str(a), str(b), c] for a, b, c in jobs]), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    driver = Path(__file__).with_name("train_driver.py")
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else ()), str(driver), str(file)],
        capture_output=True, text=True, env=os.environ | ALONE, timeout=600, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr
