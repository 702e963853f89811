"""Without lm-eval, tasks are refused by name."""

import importlib.util
from pathlib import Path

import pytest

from bitwright.commands.tasks import run_tasks
from bitwright.errors import BadRequest


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_the_extra_is_named(llama: Path) -> None:
    with pytest.raises(BadRequest, match=r"bitwright\[eval\]"):
        run_tasks(llama, ["arc_easy"])
