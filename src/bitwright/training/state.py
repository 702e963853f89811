"""The state of a training run on disk, so that it can go on after a crash.

One safetensors file: every leaf with AdamW's two moments, and in its metadata the step, the curve
so far and what the run was asked. It is written beside the old one and renamed over it, so there
is always one whole state. No pickles.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.pipeline.checkpoint import disk

MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    file: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None,
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the state in one step."""
    tensors = {f"leaf:{name}": leaf for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        moments = {} if optimizer is None else optimizer.state.get(leaf, {})
        tensors |= {f"{key}:{name}": moments[key] for key in MOMENTS if key in moments}
    partial = file.with_name(f".{file.name}.partial")
    with disk(file):
        save_file(
            {k: t.detach().contiguous() for k, t in tensors.items()},
            partial,
            metadata={"about": json.dumps(about)},
        )
        handle = os.open(partial, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        partial.replace(file)


def load_state(
    file: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> dict[str, Any] | None:
    """Put a saved state into leaves and optimizer; its metadata, or None if there is none.

    Raises BadCheckpoint if the file is damaged or of another model.
    """
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as handle:
            about: dict[str, Any] = json.loads(handle.metadata()["about"])
            for name, leaf in leaves.items():
                leaf.data.copy_(handle.get_tensor(f"leaf:{name}"))
                if optimizer is None or f"{MOMENTS[0]}:{name}" not in handle.keys():  # noqa: SIM118
                    continue
                state = {key: handle.get_tensor(f"{key}:{name}") for key in MOMENTS}
                optimizer.state[leaf] = state | {"step": torch.tensor(float(about["step"]))}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{file} is not the state of this training run ({error}): start over without --resume"
        ) from error
    return about


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], file: Path) -> None:
    """Raises BadRequest naming the first thing that two runs were asked differently."""
    plain = json.loads(json.dumps(now))
    for key in [*then, *(key for key in plain if key not in then)]:
        if then.get(key) != plain.get(key):
            raise BadRequest(
                f"--resume: {file.parent} was begun with {key} {str(then.get(key))[:60]}, now it "
                f"is {str(plain.get(key))[:60]}: ask for the same as then, or start over"
            )
