"""What a run took and with what: written beside the output, since it differs from run to run.

The output folder itself is a function of model, plan and text; times, memory, the command and
the versions go into ``OUT.run.json``.
"""

import json
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitwright import __version__
from bitwright.errors import BadRequest
from bitwright.pipeline.report import Report

LIBRARIES = ("torch", "transformers", "safetensors", "compressed-tensors", "gguf", "numba", "numpy")


def run_file(output: str | Path) -> Path:
    """Where the record of a run lies."""
    path = Path(output).expanduser()
    return path.with_name(f"{path.name}.run.json")


def describe(report: Report, command: str) -> dict[str, Any]:
    """A run as plain JSON."""
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": report.seconds,
        "peak_rss_bytes": report.peak_rss_bytes,
        "blocks": [asdict(block) for block in report.blocks],
        "versions": versions(),
    }


def write_json(path: Path, value: object) -> None:
    """Write one JSON file in one step. Raises BadRequest where that is not possible."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise BadRequest(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file. Raises BadRequest for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BadRequest(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest(f"{path} is not a JSON object")
    return value


def command_line() -> str:
    """This process's command, as one would type it."""
    return shlex.join(["bitwright", *sys.argv[1:]])


def versions() -> dict[str, str]:
    """bitwright's, Python's and the libraries' versions, and the machine."""
    found = {"bitwright": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"system": platform.platform()}
