"""The process's memory: its peak, and giving freed pages back to the system."""

import ctypes
import resource
import sys


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
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
