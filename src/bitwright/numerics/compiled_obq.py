"""OBQ's loop over one row of weights, compiled for the CPU, rows in parallel.

Plain arithmetic on numpy arrays, no policy: `methods/obq.py` says what it means.

Fixing weight q is one step of Gaussian elimination on the inverse hessian P: every other
entry loses P[i, q] P[q, j] / P[q, q]. Only the diagonal and the row of the next pivot are ever
read, so the eliminated rows are kept instead of P itself (V[j, k] = P[j, q_k] / sqrt(P[q_k, q_k])
as P stood at step k) and row q is P₀[q, j] - V[j, :k] · V[q, :k] when it is needed: the same
numbers for a sixth of I³ multiplications instead of a third, and P₀ is shared by all rows.
"""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from bitwright.numerics.parallel import parallel

Float = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Double = npt.NDArray[np.float64]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def nearest_level(
    x: Any, zero: Any, lowest: float, highest: float, table: Float, middles: Float
) -> Any:
    """The grid value nearest to ``x``, as `rounding.encode` finds it.

    Integers (an empty ``table``): rint(x) + zero, held inside lowest..highest. Floats: ``table``
    lists the non-negative values, ``middles`` what lies halfway; ``lowest`` < 0 if signed.
    """
    if table.size == 0:
        return min(max(np.rint(x) + zero, lowest), highest)
    magnitude = abs(x)
    at = np.searchsorted(middles, magnitude)
    if at < middles.size and middles[at] == magnitude and at % 2 == 1:
        at += 1
    return -table[at] if lowest < 0 and np.signbit(x) else table[at]


@numba.njit(inline="always", fastmath={"contract", "reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _dot(a: Double, b: Double, length: int) -> float:
    total = 0.0
    for k in range(length):
        total += a[k] * b[k]
    return total


@parallel()
def solve_rows(
    w_OI: Float,
    inverse_II: Double,
    scale_OI: Float,
    zero_OI: Float,
    lowest: float,
    highest: float,
    table: Float,
    middles: Float,
    reach: float,
    by_error: bool,
    steps: int,
) -> Float:
    """``steps`` greedy steps in every row; ``w`` is overwritten with the updated weights.

    A step fixes one free weight: that of largest rounding error if any error exceeds ``reach``
    scales, else that of least error² / P[i, i] (``by_error``) or of least P[i, i]. Returns the
    level, a grid value, that each weight was fixed to and NaN where it is still free; a row whose
    pivot is not positive stays NaN throughout. Memory: I² doubles per thread.
    """
    rows, width = w_OI.shape
    level_OI = np.full_like(w_OI, np.nan)
    for o in numba.prange(rows):
        w, scale, zero = w_OI[o], scale_OI[o], zero_OI[o]
        eliminated = np.empty((width, steps), dtype=np.float64)
        diagonal = np.empty(width, dtype=np.float64)
        free = np.ones(width, dtype=np.bool_)
        for j in range(width):
            diagonal[j] = inverse_II[j, j]
        for k in range(steps):
            pivot, least, level, error = -1, np.inf, w[0], w[0]
            for j in range(width):
                if free[j]:
                    at = nearest_level(w[j] / scale[j], zero[j], lowest, highest, table, middles)
                    miss = w[j] - (at - zero[j]) * scale[j]
                    key = diagonal[j]
                    if abs(miss) > reach * abs(scale[j]):
                        key = -np.float64(abs(miss))
                    elif by_error:
                        key = np.float64(miss) * miss / diagonal[j]
                    if pivot < 0 or key < least:
                        pivot, least, level, error = j, key, at, miss
            if not diagonal[pivot] > 0:
                level_OI[o, :] = np.nan
                break
            free[pivot] = False
            level_OI[o, pivot] = level
            w[pivot] -= error
            root = np.sqrt(diagonal[pivot])
            change = error / root
            for j in range(width):
                if free[j]:
                    done = _dot(eliminated[j], eliminated[pivot], k)
                    entry = (inverse_II[pivot, j] - done) / root
                    eliminated[j, k] = entry
                    diagonal[j] -= entry * entry
                    if entry != 0:  # not even the sign of a zero weight may change
                        w[j] -= change * entry
    return level_OI
