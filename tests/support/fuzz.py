"""Random damage, for a few examples in the suite or for FUZZ_SECONDS each by hand.

    FUZZ_SECONDS=60 pytest tests/formats/test_fuzz.py tests/pipeline/test_fuzz_files.py

An example that takes more than CPU_SECONDS of processor time, or a run that makes the process
GROWTH bytes larger than it ever was, fails like a wrong answer.
"""

import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

from hypothesis import given, seed, settings
from hypothesis import strategies as st

from bitwright.errors import BitwrightError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
CPU_SECONDS = 20
GROWTH = 1 << 30


def fuzz(check: Callable[[st.DataObject], None], *, examples: int = 60) -> None:
    """Call ``check`` with so many draws, and more until SECONDS are over."""
    end, number, before = time.monotonic() + SECONDS, 0, _peak()
    while number == 0 or time.monotonic() < end:
        limits = settings(max_examples=examples, database=None, deadline=None)
        seed(number)(limits(given(st.data())(lambda data: _timed(check, data))))()
        number += 1
    assert _peak() - before < GROWTH
    if SECONDS:
        print(f"{number * examples} examples in {time.monotonic() - end + SECONDS:.0f} s")


def answers_in_one_line(read: Callable[[], Any]) -> None:
    """``read`` does not fail, or with an error of ours that is one line."""
    try:
        read()
    except BitwrightError as error:
        said = str(error)
        assert said.strip()
        assert "\n" not in said


def _timed(check: Callable[[st.DataObject], None], data: st.DataObject) -> None:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"{CPU_SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        check(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
