"""What is learned behind each parameter of a model whose weights are quantized.

The model in training is the very model a checkpoint loads as: every parameter holds a rounded
value. Behind it stands a latent, in float32, which the optimizer moves. A step is

    parameter <- latent.value()          rounding
    parameter.grad from the loss         the ordinary backward pass of an ordinary model
    latent.take(parameter.grad)          gradients of the latent's own numbers
    optimizer step on those

so the forward pass in training is that of the exported checkpoint, bit for bit, and data
parallelism sees nothing but ordinary parameters.

Gradients through rounding are straight-through estimates. A weight is w~ = scale * (level - zero
point), and learned codes are positions v on the grid, level = v rounded and clamped to it:

    d w~ / d scale  = level - zero point
    d w~ / d zero   = -scale
    d w~ / d v      = scale inside the grid, 0 where it clamps

Positions, not weights: in LSQ (Esser et al. 2020, arXiv:1902.08153), where a float weight stands
behind w~, the gradient of the scale is level - w / scale, which is nothing at all for weights that
have just been quantized. With positions the scale keeps the gradient it has under fixed codes.
Scales are learned as logarithms, so one learning rate fits every layer, whatever the size of its
weights; 0.01 moves a position by a hundredth of a code per step.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.methods.rtn import rounded, rtn
from bitwright.numerics.grids import Grid, IntGrid
from bitwright.numerics.groups import expand, split
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import store_scale
from bitwright.schemes.quantized import QuantizedLinear, assemble, dequantize


class Latent(Protocol):
    """The learned numbers behind one parameter."""

    @property
    def leaves(self) -> Mapping[str, Tensor]:
        """Float32 tensors by kind ("code", "scale", "zero", "plain"); `take` fills .grad."""
        ...

    def value(self) -> Tensor:
        """What the parameter holds: the latent rounded to what is stored, as float32 or less."""
        ...

    def take(self, grad: Tensor) -> None:
        """Turn the parameter's gradient into gradients of the leaves."""
        ...


class Plain:
    """An unquantized parameter: a float32 copy, rounded to the dtype it is stored in."""

    def __init__(self, value: Tensor, stored: torch.dtype) -> None:
        self.leaves = {"plain": value.detach().float().clone()}
        self.stored = stored

    def value(self) -> Tensor:
        """The stored value."""
        return self.leaves["plain"].to(self.stored)

    def take(self, grad: Tensor) -> None:
        """The gradient, as it is."""
        self.leaves["plain"].grad = grad.float()


class MinMax:
    """A weight (O, I) whose scales cover its largest values, chosen anew at every step.

    LLM-QAT's choice (section 3.3.1: clipping outliers hurts). Works for every grid. Learned in
    units of the scale it starts with.
    """

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        self.original = q
        unit_RG = q.scale_RG.float().abs()
        if q.global_scale is not None:
            unit_RG = unit_RG * q.global_scale
        self.unit_RG = unit_RG
        self.leaves = {"code": weight_OI.detach().float() / self._unit_per_weight()}

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q = rtn(self._weight(), None, self.original.spec, search="absmax")
        return _carried(q, self.original)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return rounded(self._weight(), self.original.spec, search="absmax")

    def take(self, grad: Tensor) -> None:
        """One inside the range, and everything is inside."""
        self.leaves["code"].grad = grad * self._unit_per_weight()

    def _unit_per_weight(self) -> Tensor:
        return expand(self.unit_RG, self.original.shape, self.original.spec.group)

    def _weight(self) -> Tensor:
        return self.leaves["code"] * self._unit_per_weight()


class Scaled:
    """A quantized weight whose scales (and zero points) are learned, and its codes if asked.

    Raises BadRequest for scales that are no plain numbers (GGUF's "K" types).
    """

    def __init__(self, q: QuantizedLinear, *, codes: bool = False) -> None:
        if q.spec.super_blocks or q.group_of_column_I is not None:
            raise BadRequest("scales of this layout cannot be learned: use W4A16, Q4_0 or the like")
        self.original = q
        scale_RG = q.scale_RG.float()
        self.sign_RG = torch.where(scale_RG < 0, -1.0, 1.0)
        self.leaves = {"scale": scale_RG.abs().log()}
        if q.zero_point_RG is not None:
            self.leaves["zero"] = q.zero_point_RG.float()
        if codes:
            self.leaves["code"] = decode(q.codes_OI, q.spec.grid)

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q, codes_OI = self.original, self.original.codes_OI
        if "code" in self.leaves:
            codes_OI = encode(self.leaves["code"], q.spec.grid)
        scale_RG, zero_RG = self._scale(), self._zero()
        return _carried(assemble(codes_OI, q.spec, scale_RG, zero_RG, q.global_scale), q)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return dequantize(self.result())

    def take(self, grad: Tensor) -> None:
        """The estimates of the module's docstring."""
        q, group = self.result(), self.original.spec.group
        unit = 1.0 if q.global_scale is None else float(q.global_scale)
        scale_RG, zero_RG = self._scale() * unit, self._zero()
        level_OI = decode(q.codes_OI, q.spec.grid)
        if "code" in self.leaves:
            position_OI = self.leaves["code"]
            reach = _reach(q.spec.grid)
            inside_OI = (position_OI >= reach[0]) & (position_OI <= reach[1])
            by_code_OI = expand(scale_RG, q.shape, group) * grad
            self.leaves["code"].grad = by_code_OI.mul_(inside_OI)
        if zero_RG is not None:
            level_OI -= expand(zero_RG, q.shape, group)
            self.leaves["zero"].grad = split(grad, group).sum(-1, dtype=torch.float32) * -scale_RG
        # of the logarithm: d / d log scale = scale * d / d scale
        self.leaves["scale"].grad = split(level_OI.mul_(grad), group).sum(-1) * scale_RG

    def _scale(self) -> Tensor:
        """At the precision it is stored in, float32."""
        scale_RG = self.sign_RG * self.leaves["scale"].exp()
        return store_scale(scale_RG, self.original.spec.scale)

    def _zero(self) -> Tensor | None:
        if "zero" not in self.leaves:
            return None
        grid = self.original.spec.grid
        assert isinstance(grid, IntGrid)
        return self.leaves["zero"].round().clamp_(grid.lowest, grid.highest)


def _reach(grid: Grid) -> tuple[float, float]:
    """Positions that rounding, not clamping, puts on the grid."""
    if isinstance(grid, IntGrid):
        return grid.lowest - 0.5, grid.highest + 0.5
    return -grid.largest, grid.largest


def _carried(q: QuantizedLinear, original: QuantizedLinear) -> QuantizedLinear:
    """With the parts of a layer that do not learn."""
    return replace(
        q,
        bias_O=original.bias_O,
        input_spec=original.input_spec,
        input_scale=original.input_scale,
    )
