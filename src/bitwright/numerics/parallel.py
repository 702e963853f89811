"""Loops over rows, compiled and spread over as many threads as torch may use."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import numba
import torch

P = ParamSpec("P")
R = TypeVar("R")


def parallel(
    *, fastmath: set[str] | bool = False, error_model: str = "python"
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Compile a function of numpy arrays; its `numba.prange` takes torch's number of threads.

    Numba and torch share one OpenMP, and what numba starts with is what torch computes with from
    then on: a limit that torch was given would be lifted by the first loop, and sums would be
    taken in another order before it than after it.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        compiled = numba.njit(
            parallel=True, cache=True, fastmath=fastmath, error_model=error_model
        )(function)

        @wraps(function)
        def loop(*args: P.args, **kwargs: P.kwargs) -> R:
            threads = torch.get_num_threads()
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            result: R = compiled(*args, **kwargs)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            return result

        return loop

    return decorate
