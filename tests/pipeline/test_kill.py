"""SIGKILL anywhere: the output does not exist or is complete."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parents[1] / "support" / "kill_driver.py"


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("mode", ["events", "moments", "overwrite"])
def test_the_output_is_absent_or_complete(mode: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    command = [sys.executable, str(DRIVER), str(llama), str(folder), mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tally = json.loads(done.stdout)
    assert tally["half"] == 0
    assert tally["killed"] >= 5
    assert tally["recovered"]
    assert tally["left"] == []
    if mode == "events":
        assert tally["absent"] > 0
        assert tally["complete"] > 0
    if mode == "overwrite":
        assert tally["old"] > 0
        assert tally["complete"] > 0
