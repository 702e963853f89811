"""Train several times in this process, or in every one that torchrun started.

Called by tests with a JSON file: a list of [model, output, keywords of `train`]. The first process
writes what came of each next to its output, as OUTPUT.json. With "die_at" among the keywords, the
last process kills itself at the beginning of that step.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from bitwright import train

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def run(model: str, output: str, keywords: dict[str, Any]) -> None:
    """One training."""
    die_at = keywords.pop("die_at", None)

    def progress(done: int, total: int, note: str) -> None:
        if note.startswith("loss") and done == die_at and WORLD - 1 == RANK:
            os.kill(os.getpid(), signal.SIGKILL)

    _, outcome = train(model, output, progress=progress, **keywords)
    if RANK == 0:
        Path(f"{output}.json").write_text(json.dumps(vars(outcome)), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(*job)
