"""The command line, in this process and in one of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from bitwright.cli import main


@dataclass(frozen=True)
class Ran:
    """What a command printed and returned."""

    code: int
    out: str
    err: str


def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> Ran:
    """Call the entry point as ``bitwright ARGUMENTS`` would."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bitwright", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return Ran(code, printed.out, printed.err)


def run_apart(*arguments: object, **environment: str) -> Ran:
    """Run ``bitwright ARGUMENTS`` as a process."""
    command = [sys.executable, "-m", "bitwright.cli", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    return Ran(done.returncode, done.stdout, done.stderr)
