"""QuantizedLinear: the one value that methods produce, formats store and kernels read."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitwright.numerics.groups import expand, scale_shape, sides, split
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import storage_dtype
from bitwright.schemes.scheme import Spec

CODES_AT_ONCE = 1 << 20  # rounding takes several times the memory of the codes


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A Linear layer's weight as codes and scales.

    ``codes_OI``: uint8, one code per weight, unpacked. ``scale_RG``: already rounded to the
    precision it is stored in. ``zero_point_RG``: uint8 integers of the grid, None if symmetric.
    ``offset_RG``: float32, what specs of super-blocks subtract after scaling, in place of zero
    points.
    ``global_scale``: float32 scalar of two-level specs. ``group_of_column_I``: int64, only when
    columns of one group are not neighbours. ``bias_O`` is carried, never quantized.
    ``input_spec``: how the layer's input is rounded, None for 16 bits; ``input_scale``: float32
    (1,), the calibrated scale of static input specs (of two-level ones, their global scale).
    """

    codes_OI: Tensor
    scale_RG: Tensor
    spec: Spec
    zero_point_RG: Tensor | None = None
    global_scale: Tensor | None = None
    group_of_column_I: Tensor | None = None
    bias_O: Tensor | None = None
    input_spec: Spec | None = None
    input_scale: Tensor | None = None
    offset_RG: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes_OI.shape[0], self.codes_OI.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return self.spec.bits_per_value(self.shape)

    def rows(self, part: slice) -> "QuantizedLinear":
        """The layer made of some of the output rows.

        For specs whose groups are single rows, or whole tensors: those keep the common scale.
        """
        if self.spec.group[0] == -1:
            return replace(self, codes_OI=self.codes_OI[part], scale_RG=self.scale_RG.clone())
        if range(*part.indices(self.shape[0])) == range(self.shape[0]):
            return self
        assert self.spec.group[0] == 1
        zero, offset, bias = self.zero_point_RG, self.offset_RG, self.bias_O
        return replace(
            self,
            codes_OI=self.codes_OI[part],
            scale_RG=self.scale_RG[part],
            zero_point_RG=None if zero is None else zero[part],
            offset_RG=None if offset is None else offset[part],
            bias_O=None if bias is None else bias[part],
        )

    def to(self, device: torch.device) -> "QuantizedLinear":
        """The same layer with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, eq=False)
class CacheScales:
    """Calibrated scales of one attention's keys and values: float32, (1,) or one per head (H,)."""

    key: Tensor
    value: Tensor


def dequantize(q: QuantizedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    """(grid value - zero point) * scale - offset, computed in float32, as ``dtype``, shape (O, I).

    This is the specification of every format, kernel and runtime.
    """
    weight_OI = decode(q.codes_OI, q.spec.grid)
    if q.zero_point_RG is not None:
        weight_OI -= _per_weight(q, q.zero_point_RG.to(torch.float32))
    weight_OI *= _per_weight(q, q.scale_RG.to(torch.float32))
    if q.offset_RG is not None:
        weight_OI -= _per_weight(q, q.offset_RG)
    if q.global_scale is not None:
        weight_OI *= q.global_scale
    return weight_OI.to(dtype)


def quantize_to(
    weight_OI: Tensor,
    spec: Spec,
    scale_RG: Tensor,
    zero_RG: Tensor | None,
    global_scale: Tensor | None = None,
) -> QuantizedLinear:
    """Round every weight to the nearest code under given scales.

    ``weight_OI`` and ``scale_RG``: float32 or float64; ``zero_RG`` likewise, or None. With a
    ``global_scale`` the weight is already divided by it.
    """
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    rows = sides(shape, spec.group)[0]
    step = max(1, CODES_AT_ONCE // (shape[1] * rows)) * rows
    if len(scale_RG) == 1:
        step = max(1, CODES_AT_ONCE // shape[1])
    codes_OI = torch.empty(shape, dtype=torch.uint8, device=weight_OI.device)
    for start in range(0, shape[0], step):
        part_OI = weight_OI[start : start + step]
        scales = slice(start // rows, -(-(start + step) // rows)) if len(scale_RG) > 1 else slice(1)
        part = (part_OI.shape[0], part_OI.shape[1])
        scaled = part_OI / expand(scale_RG[scales], part, spec.group)
        if zero_RG is not None:
            scaled = scaled.round_().add_(expand(zero_RG[scales], part, spec.group))
        codes_OI[start : start + step] = encode(scaled, spec.grid)
    return assemble(codes_OI, spec, scale_RG, zero_RG, global_scale)


def assemble(
    codes_OI: Tensor,
    spec: Spec,
    scale_RG: Tensor,
    zero_RG: Tensor | None,
    global_scale: Tensor | None = None,
) -> QuantizedLinear:
    """A QuantizedLinear from codes and float scales, put into their storage types."""
    return QuantizedLinear(
        codes_OI=codes_OI,
        scale_RG=scale_RG.to(storage_dtype(spec.scale)),
        spec=spec,
        zero_point_RG=None if zero_RG is None else zero_RG.to(torch.uint8),
        global_scale=None if global_scale is None else global_scale.float(),
    )


def choose_global_scale(amax: Tensor, spec: Spec) -> Tensor | None:
    """The float32 scale of a whole two-level tensor; None for other specs.

    The largest block scale becomes the largest value of the scales' grid (NVFP4: amax / 2688).
    It equals the reciprocal of its reciprocal, which is what compressed-tensors stores.
    """
    if not spec.two_level:
        return None
    assert not isinstance(spec.scale, torch.dtype)
    scale = amax.float() / (spec.grid.largest * spec.scale.largest)
    return 1 / (1 / torch.where(scale > 0, scale, torch.ones_like(scale)))


def grouped(weight_OI: Tensor, spec: Spec) -> Tensor:
    """The weight as (number of scales, values per scale)."""
    groups = split(weight_OI, spec.group)
    return groups.reshape(-1, groups.shape[-1])


def grouped_importance(importance_I: Tensor, weight_shape: tuple[int, int], spec: Spec) -> Tensor:
    """Per-column importance as rows that line up with `grouped`, for one-row groups (G, C)."""
    _, groups = scale_shape(weight_shape, spec.group)
    return importance_I.reshape(groups, -1)


def _per_weight(q: QuantizedLinear, value_RG: Tensor) -> Tensor:
    if q.group_of_column_I is not None:
        return value_RG[:, q.group_of_column_I]
    return expand(value_RG, q.shape, q.spec.group)
