"""What is done, so that a run that was stopped can go on.

A journal is a file of JSON lines. The first says what the run was asked; every further one is a
finished block, appended only after everything the next block needs is on the disk. A line cut
short by a crash does not count. Nothing else is ever consulted to tell what is done.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.writer import disk
from bitwright.schemes.plan import Plan

NAME = "journal.jsonl"


class Journal:
    """The finished blocks of one run; ``request`` is what makes it that run."""

    def __init__(self, folder: Path, request: Mapping[str, Any]) -> None:
        """Read the journal of ``folder`` if there is one, else start it.

        Raises BadRequest, naming what differs, if it belongs to another request.
        """
        self.file = folder / NAME
        lines = _lines(self.file)
        self.blocks = lines[1:]
        if not lines:
            self._append(request, mode="w")
        elif (other := _difference(lines[0], request)) is not None:
            raise BadRequest(
                f"--resume: {folder} was begun differently, {other}: ask for the same as then, or "
                "start over without --resume"
            )

    def commit(self, block: Mapping[str, Any]) -> None:
        """Append a finished block and have it on the disk."""
        self._append(block, mode="a")
        self.blocks.append(dict(block))

    def _append(self, value: Mapping[str, Any], mode: str) -> None:
        with disk(self.file.parent):
            if mode == "a":
                _cut_torn_line(self.file)
            with self.file.open(mode, encoding="utf-8") as handle:
                handle.write(json.dumps(value) + "\n")
                handle.flush()
                os.fsync(handle.fileno())


def request_of(source: Checkpoint, plan: Plan, tokens_NT: Tensor | None) -> dict[str, Any]:
    """What has to be the same for a run to be continued: plan, model files and tokens."""
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(source.folder.glob("*"))
        if path.suffix in (".safetensors", ".json")
    }
    tokens = None
    if tokens_NT is not None:
        tokens = hashlib.sha256(tokens_NT.contiguous().numpy().tobytes()).hexdigest()
    plain: dict[str, Any] = json.loads(
        json.dumps({"plan": plan.to_json(), "model": files, "calibration tokens": tokens})
    )
    return plain


def _difference(then: Any, now: Any, path: str = "") -> str | None:
    """Where two JSON values first differ, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            found = _difference(then.get(key), now.get(key), f"{path} {key}".strip())
            if found is not None:
                return found
        return None
    if then == now:
        return None
    shown = [str(value)[:60] for value in (then, now)]
    return f"{path}: {shown[0]} then, {shown[1]} now"


def _lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines; empty if there is no journal or not even its first line is whole."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in text.split("\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _cut_torn_line(file: Path) -> None:
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with file.open("r+b") as handle:
            handle.truncate(whole)
