"""The inner loops of `super_blocks.py`, compiled for the CPU."""

import numba
import numpy as np
import numpy.typing as npt

from bitwright.numerics.parallel import parallel

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@numba.njit(cache=True, fastmath={"contract", "reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _error(
    x: Float32, weight: Float32, scale: float, offset: float, lowest: float, highest: float
) -> float:
    """Weighted squared error of one group, every value at its nearest code."""
    inverse, total = np.float32(1.0) / scale, np.float32(0.0)
    for c in range(len(x)):
        q = min(max(np.rint((x[c] + offset) * inverse), lowest), highest)
        d = q * scale - offset - x[c]
        total += weight[c] * d * d
    return total  # type: ignore[return-value]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _refit(
    x: Float32, weight: Float32, scale: float, offset: float, lowest: float, highest: float,
    asymmetric: bool,
) -> tuple[float, float]:  # fmt: skip
    """The (scale, offset) of least squares for the codes that (scale, offset) gives."""
    w, wq, wqq, wx, wqx = 0.0, 0.0, 0.0, 0.0, 0.0
    for c in range(len(x)):
        q = min(max(np.rint((x[c] + offset) / scale), lowest), highest)
        w += weight[c]
        wq += weight[c] * q
        wqq += weight[c] * q * q
        wx += weight[c] * x[c]
        wqx += weight[c] * q * x[c]
    if asymmetric:
        determinant = w * wqq - wq * wq
        if determinant > 1e-12 * w * wqq:
            fitted = (w * wqx - wq * wx) / determinant
            below = (wq * wqx - wqq * wx) / determinant
            if below >= 0 and fitted > 0:
                return fitted, below
    if wqq > 0 and (wqx > 0 or (wqx < 0 and not asymmetric)):
        return wqx / wqq, 0.0
    return scale, offset


@parallel()
def group_fits(
    x_SGC: Float32, weight_RGC: Float32, ratio_K: Float32, lowest: float, highest: float,
    asymmetric: bool,
) -> tuple[Float32, Float32]:  # fmt: skip
    """Every group's own best (scale, offset), each (S, G): values are scale * code - offset.

    Super-block s uses row s % R of ``weight``. Offsets are 0 unless ``asymmetric``, and never
    negative. The scale of a group of zeros is 0: it has no say in the unit.
    """
    supers, groups, _ = x_SGC.shape
    repeat = weight_RGC.shape[0]
    scale_SG = np.zeros((supers, groups), dtype=np.float32)
    offset_SG = np.zeros((supers, groups), dtype=np.float32)
    for s in numba.prange(supers):
        for g in range(groups):
            x, weight = x_SGC[s, g], weight_RGC[s % repeat, g]
            low, high = min(x.min(), np.float32(0.0)), max(x.max(), np.float32(0.0))
            least = np.inf
            for k in range(len(ratio_K)):
                for sign in range(1 if asymmetric else 2):
                    if asymmetric:
                        scale, offset = (high - low) * ratio_K[k] / highest, -low * ratio_K[k]
                    else:
                        scale, offset = max(high, -low) * ratio_K[k] / -lowest, np.float32(0.0)
                        scale = -scale if sign else scale
                    if abs(scale) < 1e-30:
                        continue
                    for _ in range(2):
                        a, b = _refit(x, weight, scale, offset, lowest, highest, asymmetric)
                        if abs(a) < 1e-30:
                            break
                        scale, offset = np.float32(a), np.float32(b)
                        error = _error(x, weight, scale, offset, lowest, highest)
                        if error < least:
                            least = error
                            scale_SG[s, g], offset_SG[s, g] = scale, offset
    return scale_SG, offset_SG


@parallel()
def stored_fits(
    x_SGC: Float32, weight_RGC: Float32, scale_SG: Float32, offset_SG: Float32,
    unit_SK: Float32, offset_unit_SK: Float32, lowest: float, highest: float,
    first: int, last: int, reach: int,
) -> tuple[Float32, Float32, Float64]:  # fmt: skip
    """The best pair of units, and whole multiples of them as every group's scale and offset.

    ``unit_SK``: candidates for a super-block's scale unit, ``offset_unit_SK`` for its offset
    unit (0: no offsets). Multiples of scales lie in first..last without 0, of offsets in
    0..last, within ``reach`` steps of what the group alone would choose.
    Returns (scale (S, G), offset (S, G), LS estimates of the units (S, 2)).
    """
    supers, groups, width = x_SGC.shape
    repeat, candidates = weight_RGC.shape[0], unit_SK.shape[1]
    best_scale_SG = np.ones((supers, groups), dtype=np.float32)
    best_offset_SG = np.zeros((supers, groups), dtype=np.float32)
    units_S2 = np.zeros((supers, 2), dtype=np.float64)
    for s in numba.prange(supers):
        least = np.inf
        factor_G = np.zeros(groups, dtype=np.int64)
        count_G = np.zeros(groups, dtype=np.int64)
        best_factor_G, best_count_G = factor_G.copy(), count_G.copy()
        for k in range(candidates):
            unit, below = unit_SK[s, k], offset_unit_SK[s, k]
            total = 0.0
            for g in range(groups):
                x, weight = x_SGC[s, g], weight_RGC[s % repeat, g]
                wanted = int(np.rint(scale_SG[s, g] / unit))
                wanted_count = int(np.rint(offset_SG[s, g] / below)) if below > 0 else 0
                group_least = np.inf
                for factor in range(wanted - reach, wanted + reach + 1):
                    factor = min(max(factor, first), last)
                    if factor == 0:
                        factor = 1
                    around = reach if below > 0 else 0
                    for count in range(wanted_count - around, wanted_count + around + 1):
                        count = min(max(count, 0), last)
                        error = _error(
                            x, weight, np.float32(unit * factor), np.float32(below * count),
                            lowest, highest,
                        )  # fmt: skip
                        if error < group_least:
                            group_least = error
                            factor_G[g], count_G[g] = factor, count
                total += group_least
            if total < least:
                least = total
                for g in range(groups):
                    best_scale_SG[s, g] = np.float32(unit * factor_G[g])
                    best_offset_SG[s, g] = np.float32(below * count_G[g])
                    best_factor_G[g], best_count_G[g] = factor_G[g], count_G[g]
        aa, ab, bb, ax, bx = 0.0, 0.0, 0.0, 0.0, 0.0
        for g in range(groups):
            scale, offset = best_scale_SG[s, g], best_offset_SG[s, g]
            for c in range(width):
                x, weight = x_SGC[s, g, c], weight_RGC[s % repeat, g, c]
                q = min(max(np.rint((x + offset) / scale), lowest), highest)
                a, b = best_factor_G[g] * q, -float(best_count_G[g])
                aa += weight * a * a
                ab += weight * a * b
                bb += weight * b * b
                ax += weight * a * x
                bx += weight * b * x
        determinant = aa * bb - ab * ab
        if determinant > 1e-9 * aa * bb:
            units_S2[s, 0] = (bb * ax - ab * bx) / determinant
            units_S2[s, 1] = (aa * bx - ab * ax) / determinant
        elif aa > 0:
            units_S2[s, 0] = ax / aa
    return best_scale_SG, best_offset_SG, units_S2
