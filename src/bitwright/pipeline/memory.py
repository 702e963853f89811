"""The process's memory: its peak, and giving freed pages back to the system."""

import ctypes
import resource
import sys
from pathlib import Path


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux counts the parent's memory at the moment of the start into ``ru_maxrss``; VmHWM is
    this program's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Ask glibc to return free pages; without it, resident memory creeps up block by block.

    Costs about a millisecond; does nothing where there is no malloc_trim.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
