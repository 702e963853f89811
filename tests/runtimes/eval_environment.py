"""A virtual environment with lm-eval and what bitwright itself needs, made once and kept."""

import tomllib
from pathlib import Path

import bitwright
from runtimes.environment import environment

PACKAGE = "lm-eval[hf]==0.4.13"


def eval_python() -> Path:
    """The interpreter of the environment. Raises CannotInstallError."""
    project = Path(bitwright.__file__).parents[2] / "pyproject.toml"
    needs = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    return environment(
        "lm-eval-0.4.13", (("install", "torch==2.13.0"), ("install", *needs, PACKAGE))
    )
