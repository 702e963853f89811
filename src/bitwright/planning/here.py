"""This machine's CPU as a device: its memory, and peaks measured in about a second."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch

from bitwright.planning.hardware import Device, find_device

READ_BYTES = 256 * 2**20
SIDE = 1024
ROUNDS = 5


@cache
def measured_here() -> Device:
    """The device HERE: memory of the machine, fastest of a few reads and products with torch.

    Bandwidth: summing 256 MiB, more than caches share out. Rates: square products of 1024, the
    16-bit one in bfloat16 or float32, whichever is faster. All of torch's threads are used.
    """
    block = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    bandwidth = READ_BYTES / _fastest(block.sum)
    del block
    wide = torch.randn(SIDE, SIDE)
    narrow, integer = wide.bfloat16(), wide.mul(30).to(torch.int8)
    operations = 2.0 * SIDE**3
    rate = max(
        operations / _fastest(lambda: torch.mm(narrow, narrow)),
        operations / _fastest(lambda: torch.mm(wide, wide)),
    )
    rates = {"FP16": rate, "BF16": rate}
    rates["INT8"] = max(rate, operations / _fastest(lambda: torch._int_mm(integer, integer)))
    assumed = find_device("CPU")
    return replace(
        assumed,
        name="HERE",
        memory_bytes=_memory_bytes() or assumed.memory_bytes,
        bandwidth=bandwidth,
        rates=rates,
        origin="measured",
        source=f"this machine, {torch.get_num_threads()} threads of torch {torch.__version__}",
    )


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one that does not count."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _memory_bytes() -> float:
    """Of the whole machine; 0 where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 0.0
