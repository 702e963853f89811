"""Train several times in the processes that torchrun started.

Called by test_processes.py with a JSON file: a list of [model, output, keywords of `train`]. The
first process writes what came of each next to its output, as OUTPUT.json.
"""

import json
import os
import sys
from pathlib import Path

import torch

from bitwright import train


def main(file: str) -> None:
    """Run the list."""
    torch.set_num_threads(1)
    for model, output, keywords in json.loads(Path(file).read_text(encoding="utf-8")):
        _, outcome = train(model, output, **keywords)
        if os.environ["RANK"] == "0":
            Path(f"{output}.json").write_text(json.dumps(vars(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
