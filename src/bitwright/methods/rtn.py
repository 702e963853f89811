"""Round-to-nearest: the baseline every other method has to beat."""

from torch import Tensor

from bitwright.numerics.groups import join, scale_shape
from bitwright.numerics.scales import Search, choose_scale, project
from bitwright.schemes.quantized import (
    QuantizedLinear,
    choose_global_scale,
    grouped,
    grouped_importance,
    quantize_to,
)
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats


def rtn(
    weight_OI: Tensor, stats: InputStats | None, spec: Spec, *, search: Search = "mse"
) -> QuantizedLinear:
    """Each weight to its nearest code; scales from `choose_scale`.

    ``weight_OI``: float32 or float64 (O, I). With ``stats``, squared errors in the scale search
    are weighted by the hessian's diagonal, the mean square of each input channel.
    Raises BadShape if the group size does not divide I.
    """
    importance = None if stats is None else stats.hessian_II.diagonal()
    weight_OI, global_scale = without_global_scale(weight_OI, spec)
    scale_RG, zero_RG = choose_scales(weight_OI, spec, search=search, importance_I=importance)
    return quantize_to(weight_OI, spec, scale_RG, zero_RG, global_scale)


def without_global_scale(weight_OI: Tensor, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """(weight / global scale, global scale) of a two-level spec, else (weight, None)."""
    global_scale = choose_global_scale(weight_OI.abs().amax(), spec)
    return (weight_OI if global_scale is None else weight_OI / global_scale), global_scale


def rounded(
    weight_OI: Tensor, spec: Spec, *, search: Search, importance_I: Tensor | None = None
) -> Tensor:
    """What `rtn` reads back as, without making codes: for searches that try many weights."""
    weight_OI, global_scale = without_global_scale(weight_OI, spec)
    scale_RG, zero_RG = choose_scales(weight_OI, spec, search=search, importance_I=importance_I)
    zero = None if zero_RG is None else zero_RG.reshape(-1, 1)
    groups_NC = project(grouped(weight_OI, spec), scale_RG.reshape(-1, 1), zero, spec.grid)
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    rounded_OI = join(groups_NC, shape, spec.group)
    return rounded_OI if global_scale is None else rounded_OI * global_scale


def choose_scales(
    weight_OI: Tensor, spec: Spec, *, search: Search, importance_I: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`choose_scale` for a whole weight: scale (R, G) and zero point (R, G) or None."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    scales = scale_shape(shape, spec.group)
    importance = None
    if importance_I is not None and spec.group[0] == 1:
        importance = grouped_importance(importance_I.to(weight_OI.dtype), shape, spec)
    scale, zero = choose_scale(
        grouped(weight_OI, spec),
        spec.grid,
        dtype=spec.scale,
        symmetric=not spec.asymmetric,
        search=search,
        importance_RC=importance,
    )
    return scale.reshape(scales), None if zero is None else zero.reshape(scales)
