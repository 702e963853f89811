"""The inner loops that would be too slow as tensor operations, compiled for the CPU.

Plain arithmetic on numpy arrays, no policy: their meaning is fixed by the tensor code that
calls them (`scales.py`, `methods/gptq.py`), and tests hold the two against each other.
"""

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.extending import intrinsic

from bitwright.numerics.parallel import parallel

Float = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
Index = npt.NDArray[np.int64]

LANES = 16  # float32 numbers of an AVX-512 register


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _first_least(error_K: Float) -> int:
    """Where the least number is; unlike argmin it passes over NaN."""
    best = 0
    for k in range(1, len(error_K)):
        if error_K[k] < error_K[best]:
            best = k
    return best


@parallel(fastmath={"contract", "reassoc", "nsz"})
def best_candidate(
    x_NC: Float, weight_RC: Float, scale_NK: Float, zero_NK: Float, lowest: float, highest: float
) -> Index:
    """For each group of values, the candidate (scale, zero) of least weighted squared error.

    Row n of ``x`` uses row n % R of ``weight``. Ties keep the earlier candidate. Candidates lie
    side by side in the innermost loop, so that it has no sum across lanes.
    """
    groups, width = x_NC.shape
    candidates = scale_NK.shape[1]
    repeat = weight_RC.shape[0]
    kind = x_NC.dtype.type  # without it the bounds would turn the loop into float64
    best_N = np.zeros(groups, dtype=np.int64)
    for n in numba.prange(groups):
        x = x_NC[n]
        weight = weight_RC[n % repeat]
        scale = scale_NK[n]
        inverse, low, high = np.empty_like(scale), np.empty_like(scale), np.empty_like(scale)
        error = np.zeros_like(scale)
        for k in range(candidates):
            inverse[k] = kind(1.0) / scale[k]
            low[k] = kind(lowest) - zero_NK[n, k]
            high[k] = kind(highest) - zero_NK[n, k]
        for c in range(width):
            value, importance = x[c], weight[c]
            for k in range(candidates):
                q = min(max(np.rint(value * inverse[k]), low[k]), high[k])
                d = q * scale[k] - value
                error[k] += importance * d * d
        best_N[n] = _first_least(error)
    return best_N


@parallel()
def round_trip(
    x_NC: Float, scale_N1: Float, zero_N1: Float, lowest: float, highest: float
) -> Float:
    """Each value rounded to the nearest code of its row's grid, and read back."""
    out_NC = np.empty_like(x_NC)
    for n in numba.prange(x_NC.shape[0]):
        scale, zero = scale_N1[n, 0], zero_N1[n, 0]
        for c in range(x_NC.shape[1]):
            q = min(max(np.rint(x_NC[n, c] / scale) + zero, lowest), highest)
            out_NC[n, c] = (q - zero) * scale
    return out_NC


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _tile(w_OB: Float, first: int, lanes: int) -> Float:
    """Rows ``first`` to ``first + lanes``, transposed, (B, LANES)."""
    w = np.zeros((w_OB.shape[1], LANES), dtype=w_OB.dtype)
    for o in range(lanes):
        for i in range(w_OB.shape[1]):
            w[i, o] = w_OB[first + o, i]
    return w


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _make_up(w: Float, error: Float, u_B: Float, start: int) -> None:
    """Columns from ``start`` on lose their share of a column's error."""
    for j in range(start, w.shape[0]):
        u = u_B[j]
        for o in range(LANES):
            w[j, o] -= error[o] * u


@parallel(fastmath={"contract"}, error_model="numpy")
def solve_columns(
    w_OB: Float, u_BB: Float, scale_OB: Float, zero_OB: Float, lowest: float, highest: float
) -> tuple[Codes, Float]:
    """GPTQ's sequential step inside one batch of columns; ``w`` is left as it is.

    Column i is rounded, its error divided by U[i, i], and every later column of the batch
    loses error * U[i, j]. Returns (codes minus lowest, errors), both (O, B). A tile of rows is
    transposed, so that the innermost loops run over rows, which do not wait for each other.
    """
    rows, width = w_OB.shape
    kind = w_OB.dtype.type  # without it the bounds would turn the loop into float64
    low, high = kind(lowest), kind(highest)
    codes_OB = np.empty((rows, width), dtype=np.uint8)
    error_OB = np.empty_like(w_OB)
    for tile in numba.prange(-(-rows // LANES)):
        first = tile * LANES
        lanes = min(LANES, rows - first)
        w, error = _tile(w_OB, first, lanes), np.zeros(LANES, dtype=w_OB.dtype)
        for i in range(width):
            for o in range(lanes):
                scale, zero = scale_OB[first + o, i], zero_OB[first + o, i]
                q = min(max(np.rint(w[i, o] / scale) + zero, low), high)
                codes_OB[first + o, i] = np.uint8(q - low)
                error[o] = (w[i, o] - (q - zero) * scale) / u_BB[i, i]
                error_OB[first + o, i] = error[o]
            _make_up(w, error, u_BB[i], i + 1)
    return codes_OB, error_OB


@intrinsic  # type: ignore[untyped-decorator]
def _power_below(_: object, value: numba.types.Float) -> object:
    """The largest power of two not above |value|: a float without its sign and mantissa."""
    bits, exponent = (32, 0x7F800000) if value.bitwidth == 32 else (64, 0x7FF0000000000000)

    def generate(_: object, builder: ir.IRBuilder, __: object, args: list[ir.Value]) -> ir.Value:
        number = ir.IntType(bits)
        kept = builder.and_(builder.bitcast(args[0], number), ir.Constant(number, exponent))
        return builder.bitcast(kept, args[0].type)

    return value(value), generate


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _nearest_float(value: float, least: float, bound: float, steps: float) -> float:
    """The nearest value of a grid up to ``bound`` whose steps grow from the power ``least`` on.

    A sum with ``steps`` = 1.5 * 2^23 steps (2^52 in float64) keeps whole steps only, rounded to
    nearest even.
    """
    bounded = min(max(value, -bound), bound)
    shift = max(_power_below(bounded), least) * steps
    return (bounded + shift) - shift  # type: ignore[no-any-return]


@parallel(fastmath={"contract"}, error_model="numpy")
def best_float_candidate(
    x_NC: Float, weight_RC: Float, scale_NK: Float, mantissa: int, smallest: int, largest: float
) -> Index:
    """`best_candidate` for a FloatGrid of ``mantissa`` bits and ``smallest`` exponent."""
    groups, width = x_NC.shape
    candidates = scale_NK.shape[1]
    repeat = weight_RC.shape[0]
    kind = x_NC.dtype.type
    least, bound = kind(2.0**smallest), kind(largest)
    steps = kind(1.5 * 2.0**-mantissa / np.finfo(kind).eps)
    best_N = np.zeros(groups, dtype=np.int64)
    for n in numba.prange(groups):
        x = x_NC[n]
        weight = weight_RC[n % repeat]
        scale = scale_NK[n]
        inverse = kind(1.0) / scale
        error = np.zeros_like(scale)
        for c in range(width):
            value, importance = x[c], weight[c]
            for k in range(candidates):
                q = _nearest_float(value * inverse[k], least, bound, steps)
                d = q * scale[k] - value
                error[k] += importance * d * d
        best_N[n] = _first_least(error)
    return best_N


@parallel(fastmath={"contract"}, error_model="numpy")
def solve_float_columns(
    w_OB: Float, u_BB: Float, scale_OB: Float, mantissa: int, smallest: int, largest: float
) -> tuple[Float, Float]:
    """`solve_columns` for a FloatGrid: (grid values, errors), (O, B); ``w`` is left as it is."""
    rows, width = w_OB.shape
    kind = w_OB.dtype.type
    least, bound = kind(2.0**smallest), kind(largest)
    steps = kind(1.5 * 2.0**-mantissa / np.finfo(kind).eps)
    level_OB = np.empty_like(w_OB)
    error_OB = np.empty_like(w_OB)
    for tile in numba.prange(-(-rows // LANES)):
        first = tile * LANES
        lanes = min(LANES, rows - first)
        w, error = _tile(w_OB, first, lanes), np.zeros(LANES, dtype=w_OB.dtype)
        for i in range(width):
            for o in range(lanes):
                scale = scale_OB[first + o, i]
                x = w[i, o] / scale
                level = np.copysign(_nearest_float(x, least, bound, steps), x)  # -0 is a code
                level_OB[first + o, i] = level
                error[o] = (w[i, o] - level * scale) / u_BB[i, i]
                error_OB[first + o, i] = error[o]
            _make_up(w, error, u_BB[i], i + 1)
    return level_OB, error_OB
