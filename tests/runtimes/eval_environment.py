"""A virtual environment with lm-eval and what bitwright itself needs, made once and kept."""

import os
import shutil
import tomllib
from pathlib import Path

import bitwright
from runtimes.environment import CannotInstallError, _call, _locked

PACKAGE = "lm-eval[hf]==0.4.13"
__all__ = ["CannotInstallError", "eval_python"]


def eval_python() -> Path:
    """The interpreter of the environment. Raises CannotInstallError."""
    project = Path(bitwright.__file__).parents[2] / "pyproject.toml"
    needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    home = Path.home() / ".cache" / "bitwright" / "runtimes"
    root = Path(os.environ.get("BITWRIGHT_RUNTIMES", home)).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / "lm-eval-0.4.13"
    python, marker = folder / "bin" / "python", folder / "complete"
    recipe = "\n".join(["torch==2.13.0", *needs, PACKAGE])
    with _locked(root / f"{folder.name}.lock"):
        if not marker.is_file() or marker.read_text(encoding="utf-8") != recipe:
            shutil.rmtree(folder, ignore_errors=True)
            _call([shutil.which("python3") or "python3", "-m", "venv", str(folder)])
            _call([str(python), "-m", "pip", "install", "torch==2.13.0"])
            _call([str(python), "-m", "pip", "install", *needs, PACKAGE])
            marker.write_text(recipe, encoding="utf-8")
    return python
