"""Kill a run at random moments, resume it, compare with an uninterrupted one.

Called by test_resume.py with: MODEL TEXT FOLDER METHOD TRIALS. Imports once, then forks:
the kills fall on the work. Every other trial is killed twice. Prints one JSON object.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from bitwright import api
from bitwright.pipeline.journal import NAME


def run(model: str, text: str, out: Path, method: str, resume: bool, seconds: float) -> bool:
    """One run, killed after a while; whether it was."""
    pid = os.fork()
    if pid == 0:
        try:
            api.quantize(
                model, out, resume=resume, method=method, scheme="W3A16", group_size=32,
                calibration=text, samples=48, sequence_length=64, effort="fast",
                true_inputs=0.25 if "gptq" in method else 0.0,
            )  # fmt: skip
            os._exit(0)
        finally:
            os._exit(1)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "a run failed by itself"
    return False


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """All trials."""
    model, text, folder, method, trials = *sys.argv[1:3], Path(sys.argv[3]), *sys.argv[4:6]
    run(model, text, folder / "warm", method, False, 0)
    start = time.perf_counter()
    run(model, text, folder / "whole", method, False, 0)
    duration = time.perf_counter() - start
    whole = contents(folder / "whole")
    out = folder / "out"
    tally = {"killed": 0, "same": 0, "resumed": 0, "trials": int(trials), "seconds": duration}
    randomness = random.Random(method)
    for trial in range(int(trials)):
        for kill in range(1 + trial % 2):
            if out.exists():
                break
            moment = randomness.uniform(0.1, 1.0) * duration
            tally["killed"] += run(model, text, out, method, kill > 0, moment)
        journal = folder / ".out.work" / NAME
        tally["resumed"] += journal.exists() and len(journal.read_text().splitlines()) > 1
        if not out.exists():
            run(model, text, out, method, True, 0)
        tally["same"] += contents(out) == whole
        shutil.rmtree(out)
    left = sorted(path.name for path in folder.iterdir())
    print(json.dumps(tally | {"left": left}))


if __name__ == "__main__":
    main()
