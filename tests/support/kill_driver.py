"""Quantize many times, each in a forked process that is killed somewhere on the way.

Called by test_kill.py with: MODEL FOLDER MODE. Imports once, then forks: every trial is fast
and the kill falls on the work, not on the imports. Prints one JSON object.

MODE "events": SIGKILL at the n-th call that touches files. MODE "moments": after a random time.
MODE "overwrite": as "events", over an older output.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bitwright import api

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}


def quantize(model: Path, out: Path, bits: int) -> None:
    """The work of one trial."""
    api.quantize(model, out, scheme=f"W{bits}A16", group_size=32, overwrite=True)


def child(model: Path, out: Path, at: int, count_file: Path) -> None:
    """Run to the end, or die at event number ``at``."""
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in EVENTS or not str(arguments[0]).startswith(str(out.parent)):
            return
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    sys.addaudithook(audit)
    quantize(model, out, 4)
    events = seen
    count_file.write_text(str(events))
    os._exit(0)


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder, None if there is none."""
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else None


def trial(model: Path, out: Path, at: int, seconds: float, count_file: Path) -> bool:
    """One run; whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            child(model, out, at, count_file)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "a trial failed by itself"
    return False


def main() -> None:
    """All trials of one mode."""
    model, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    out, older, count_file = folder / "out", folder / "older", folder / "count"
    old = None
    if mode == "overwrite":
        pid = os.fork()
        if pid == 0:
            quantize(model, older, 8)
            os._exit(0)
        os.waitpid(pid, 0)
        old = contents(older)
        shutil.copytree(older, out)
    start = time.perf_counter()
    assert not trial(model, out, -1, 0, count_file)
    duration = time.perf_counter() - start
    complete = contents(out)
    events = int(count_file.read_text())
    shutil.rmtree(out)
    tally = {"absent": 0, "complete": 0, "old": 0, "half": 0, "killed": 0, "events": events}
    randomness = random.Random(0)
    step = events if mode == "overwrite" else max(1, events // 8)
    trials = sorted(
        {*range(0, events, step), *range(events - (20 if old else 6), events, 3 if old else 1)}
    )
    for number in trials:
        if old is not None and not out.exists():
            shutil.copytree(older, out)
        if mode != "moments":  # leftovers of the last kill would shift the count
            shutil.rmtree(folder / ".out.partial", ignore_errors=True)
            shutil.rmtree(folder / ".out.work", ignore_errors=True)
        moment = randomness.uniform(0.02, duration) if mode == "moments" else 0.0
        at = -1 if mode == "moments" else number
        tally["killed"] += trial(model, out, at, moment, count_file)
        found = contents(out)
        if found is None:
            tally["absent"] += 1
        elif found == complete:
            tally["complete"] += 1
            shutil.rmtree(out)
        elif found == old:
            tally["old"] += 1
        else:
            tally["half"] += 1
            shutil.rmtree(out)
    assert not trial(model, out, -1, 0, count_file)
    tally["recovered"] = contents(out) == complete
    tally["left"] = sorted(
        p.name for p in folder.iterdir() if p.name not in ("out", "older", "count")
    )  # type: ignore[assignment]
    print(json.dumps(tally))


if __name__ == "__main__":
    main()
