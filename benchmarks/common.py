"""What every benchmark shares: the machine, child processes, tables, results files.

Nothing heavy is imported here. On Linux the peak memory of a child includes that of the process
that started it, up to the moment of the start; scripts that measure children must stay small
themselves, so whatever needs torch runs in a child too.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LIBRARIES = ("bitwright", "torch", "transformers", "safetensors", "numba", "compressed-tensors")
BUSY = 0.5

Row = dict[str, Any]


@dataclass(frozen=True)
class Child:
    """A finished process. ``peak_rss_bytes``: of the largest single process it started."""

    code: int
    seconds: float
    peak_rss_bytes: int
    stdout: str
    stderr: str

    @property
    def failure(self) -> str:
        """The last line that says what went wrong; "" if nothing did."""
        if self.code == 0:
            return ""
        stripped = [line.strip(" │╭╮╰╯─") for line in self.stderr.splitlines()]
        lines = [line for line in stripped if line]
        return lines[-1][:300] if lines else f"exit code {self.code}"

    def last_json(self) -> dict[str, Any]:
        """The JSON object on the last line of the output; empty if there is none."""
        lines = self.stdout.strip().splitlines()
        try:
            found = json.loads(lines[-1]) if lines else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    kill_after: float | None = None,
) -> Child:
    """Run ``command`` to its end and read its wall time and peak memory from wait4.

    ``kill_after``: seconds after which it gets SIGKILL; the code is -9 then.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, env={**os.environ, **(environment or {})}
        )
        alarm = threading.Timer(kill_after or 0.0, os.kill, (process.pid, signal.SIGKILL))
        if kill_after is not None:
            alarm.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            alarm.cancel()
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", errors="replace"))
    unit = 1 if sys.platform == "darwin" else 1024
    return Child(process.returncode, seconds, usage.ru_maxrss * unit, texts[0], texts[1])


def bitwright(*arguments: object) -> list[str]:
    """The command line of bitwright with this interpreter."""
    return [sys.executable, "-m", "bitwright.cli", *map(str, arguments)]


def shown(command: Iterable[object]) -> str:
    """A command line to print and to keep: paths by their last name, no machine's folders."""
    words = []
    for word in map(str, command):
        words.append(Path(word).name if "/" in word and Path(word).is_absolute() else word)
    return shlex.join(words).replace(f"{Path(sys.executable).name} -m bitwright.cli", "bitwright")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, library versions, and how busy the machine is now."""
    load = round(os.getloadavg()[0], 1)
    if load > BUSY:
        print(f"the machine is busy (load {load}): seconds will be too high", file=sys.stderr)
    libraries = {}
    for name in LIBRARIES:
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "load_before": load,
        "libraries": libraries,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    known = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    name = fields.get("model name", platform.processor())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family else name


def commit() -> str:
    """The commit measured, with a plus sign if the package differs from it; "" outside git."""
    root = str(RESULTS.parent.parent)
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, check=True
        )
        changed = subprocess.run(["git", "-C", root, "diff", "--quiet", "HEAD", "--", "src"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.decode().strip() + ("+" if changed.returncode else "")


class Results:
    """benchmarks/results/NAME.json, rewritten after every row: machine, date, command, rows."""

    def __init__(self, name: str, *, fresh: bool = False) -> None:
        self.path = RESULTS / f"{name}.json"
        self.rows: list[Row] = []
        self.machine = machine()
        if self.path.exists() and not fresh:
            before = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(before["machine"][key] == self.machine[key] for key in ("cpu", "cores"))
            if not same:
                raise SystemExit(
                    f"{self.path.name} was measured on another machine "
                    f"({before['machine']['cpu']}): choose another --name or add --again"
                )
            self.rows = before["rows"]

    def find(self, key: Row) -> Row | None:
        """The row that has these values and did not fail, if any."""
        for row in self.rows:
            if "error" not in row and all(row.get(name) == value for name, value in key.items()):
                return row
        return None

    def add(self, key: Row, row: Row) -> None:
        """Append ``row``, in place of earlier ones with the same key, and save."""
        kept = [old for old in self.rows if any(old.get(name) != key[name] for name in key)]
        self.rows = [*kept, {**row, **key, "date": _now(), "commit": commit()}]
        self.save()

    def save(self) -> None:
        """Write the file in one step."""
        value = {
            "machine": self.machine,
            "date": _now(),
            "command": shown(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
            "rows": self.rows,
        }
        RESULTS.mkdir(exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(self.path)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


class Table:
    """Rows printed as they come, in fixed-width columns: (title, width, format)."""

    def __init__(self, *columns: tuple[str, int, str]) -> None:
        self._columns = columns
        cells = (_fit(title, width, form) for title, width, form in columns)
        print("  ".join(cells).rstrip(), flush=True)

    def row(self, *values: object) -> None:
        """Print one row; None is an empty cell, a string is printed as it is."""
        cells = []
        for value, (_, width, form) in zip(values, self._columns, strict=True):
            number = isinstance(value, (int, float))
            text = format(value, form) if number else "-" if value is None else str(value)
            cells.append(_fit(text, width, form))
        print("  ".join(cells).rstrip(), flush=True)


def _fit(text: str, width: int, form: str) -> str:
    return text.rjust(width) if form else text.ljust(width)
