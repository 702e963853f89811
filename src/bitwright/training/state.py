"""The state of a training run on disk, so that it can go on after a crash.

Every process keeps its leaves with AdamW's two moments in a safetensors file of its own; the
metadata has the step, the curve so far and what the run was asked. The files of one step lie in a
folder ``state-STEP``, which gets this name when all are complete and then replaces the one before:
there is always one whole state, of one step. No pickles.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest
from bitwright.pipeline.writer import disk
from bitwright.training.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError)


def save_state(
    folder: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
    about: Mapping[str, Any], processes: Processes,
) -> None:  # fmt: skip
    """Write the state of step ``about["step"]``; called by all processes."""
    partial, older = folder / "state.partial", saved_states(folder)
    tensors = {f"leaf:{name}": leaf for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        moments = optimizer.state.get(leaf, {})
        tensors |= {f"{key}:{name}": moments[key] for key in MOMENTS if key in moments}
    with disk(folder):
        partial.mkdir(parents=True, exist_ok=True)
        _write(_file(partial, processes), tensors, about)
        processes.meet()
        if processes.rank == 0:
            partial.rename(folder / f"state-{about['step']}")
            for state in older:
                shutil.rmtree(state)
        processes.meet()


def saved_states(folder: Path) -> list[Path]:
    """The states in ``folder``, the newest last; more than one after a crash just then."""
    return sorted(folder.glob("state-*"), key=lambda state: int(state.name.rpartition("-")[2]))


def load_state(
    folder: Path, leaves: Mapping[str, Tensor], optimizer: torch.optim.Optimizer,
    request: Mapping[str, Any], processes: Processes,
) -> dict[str, Any] | None:  # fmt: skip
    """Put the newest state into leaves and optimizer; its metadata, or None if there is none.

    Raises BadRequest if it is of another ``request``, BadCheckpoint if it is damaged.
    """
    states = saved_states(folder)
    if not states:
        return None
    file = _file(states[-1], processes)
    if not file.is_file():  # there were fewer processes
        file = states[-1] / "0.safetensors"
    try:
        with safe_open(file, framework="pt") as handle:
            about: dict[str, Any] = json.loads(handle.metadata()["about"])
            require_same(about["request"], request, folder)
            step = float(about["step"])
            for name, leaf in leaves.items():
                leaf.data.copy_(handle.get_tensor(f"leaf:{name}"))
                if f"{MOMENTS[0]}:{name}" not in handle.keys():  # noqa: SIM118
                    continue
                moments = {key: handle.get_tensor(f"{key}:{name}") for key in MOMENTS}
                moments["step"] = torch.tensor(step)
                optimizer.state[leaf] = {k: v.to(leaf.device) for k, v in moments.items()}
    except DAMAGE as error:
        raise _damaged(file, error) from error
    return about


def save_leaves(folder: Path, leaves: Mapping[str, Tensor], processes: Processes) -> None:
    """Keep the leaves alone, in one step per process."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(_file(folder, processes), leaves, {})


def load_leaves(folder: Path, leaves: Mapping[str, Tensor], processes: Processes) -> None:
    """Take back what `save_leaves` kept. Raises BadCheckpoint."""
    file = _file(folder, processes)
    try:
        with safe_open(file, framework="pt") as handle:
            for name, leaf in leaves.items():
                leaf.data.copy_(handle.get_tensor(name))
    except DAMAGE as error:
        raise _damaged(file, error) from error


def _file(folder: Path, processes: Processes) -> Path:
    return folder / f"{processes.rank}.safetensors"


def _write(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={"about": json.dumps(about)},
    )
    handle = os.open(partial, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
    partial.replace(file)


def _damaged(file: Path, error: Exception) -> BadCheckpoint:
    return BadCheckpoint(
        f"{file} is not the state of this training run ({error}): start over without --resume"
    )


def require_same(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raises BadRequest naming the first thing that two runs were asked differently."""
    plain = json.loads(json.dumps(now))
    for key in [*then, *(key for key in plain if key not in then)]:
        if then.get(key) != plain.get(key):
            raise BadRequest(
                f"--resume: {folder} was begun with {key} {str(then.get(key))[:60]}, now it "
                f"is {str(plain.get(key))[:60]}: ask for the same as then, or start over"
            )
