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

Positions, not weights: with a float weight behind w~ (`Stepped`, LSQ) the gradient of the scale
is level - w / scale, which is nothing at all for weights that have just been quantized. With
positions the scale keeps the gradient it has under fixed codes. Scales are learned as logarithms,
so one learning rate fits every layer, whatever the size of its weights; 0.01 moves a position by
a hundredth of a code per step.

Every estimate is of one layer's rows and uses no others' (`processes.splits` says where not).
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.methods.rtn import rounded, rtn
from bitwright.numerics.grids import E8M0, Grid, IntGrid
from bitwright.numerics.groups import expand, split
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import store_scale
from bitwright.schemes.quantized import QuantizedLinear, assemble, dequantize, quantize_to


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


class _Weight:
    """A float32 weight (O, I), learned in units of the scales it starts with (kind "code")."""

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        unit_RG = q.scale_RG.float().abs()
        if q.global_scale is not None:
            unit_RG = unit_RG * q.global_scale
        self._unit_RG, self._shape, self._group = unit_RG, q.shape, q.spec.group
        self.leaf = weight_OI.detach().float() / self._unit()

    def value(self) -> Tensor:
        """The weight."""
        return self.leaf * self._unit()

    def take(self, grad_OI: Tensor) -> None:
        """From the gradient of the weight."""
        self.leaf.grad = grad_OI * self._unit()

    def _unit(self) -> Tensor:
        return expand(self._unit_RG, self._shape, self._group)


class _Scales:
    """Learned scales and zero points (R, G) of a layer, as logarithms and as numbers to round.

    Raises BadRequest for scales that are no plain numbers (GGUF's "K" types).
    """

    def __init__(self, q: QuantizedLinear) -> None:
        if q.spec.super_blocks or q.group_of_column_I is not None:
            raise BadRequest("scales of this layout cannot be learned: use W4A16, Q4_0 or the like")
        self._spec = q.spec
        self._whole = 1.0 if q.global_scale is None else q.global_scale
        scale_RG = q.scale_RG.float()
        self._sign_RG = torch.where(scale_RG < 0, -1.0, 1.0)
        self.leaves = {"scale": scale_RG.abs().log()}
        if q.zero_point_RG is not None:
            self.leaves["zero"] = q.zero_point_RG.float()

    def scale(self) -> Tensor:
        """At the precision it is stored in, float32; powers of two to the nearest one, so that
        a scale does not stand at the border of the next."""
        log_RG = self.leaves["scale"]
        if self._spec.scale == E8M0:
            log_RG = torch.round(log_RG / math.log(2))
            size_RG = torch.ldexp(torch.ones_like(log_RG), log_RG.int())
        else:
            size_RG = log_RG.exp()
        return store_scale(self._sign_RG * size_RG, self._spec.scale)

    def full_scale(self) -> Tensor:
        """Times the global scale, if there is one: what a level is multiplied by."""
        return self.scale() * self._whole

    def zero(self) -> Tensor | None:
        """The zero points as stored, float32; None if symmetric."""
        if "zero" not in self.leaves:
            return None
        grid = self._spec.grid
        assert isinstance(grid, IntGrid)
        return self.leaves["zero"].round().clamp_(grid.lowest, grid.highest)

    def take(self, by_scale_RG: Tensor, by_zero_RG: Tensor | None) -> None:
        """From the gradients of the full scale and of the zero points."""
        # of the logarithm: d / d log scale = scale * d / d scale
        self.leaves["scale"].grad = by_scale_RG * self.full_scale()
        if by_zero_RG is not None:
            self.leaves["zero"].grad = by_zero_RG


class MinMax:
    """A weight (O, I) whose scales cover its largest values, chosen anew at every step.

    LLM-QAT's choice (section 3.3.1: clipping outliers hurts). Works for every grid.
    """

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        self.original = q
        self._weight = _Weight(weight_OI, q)
        self.leaves = {"code": self._weight.leaf}

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q = rtn(self._weight.value(), None, self.original.spec, search="absmax")
        return _carried(q, self.original)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return rounded(self._weight.value(), self.original.spec, search="absmax")

    def take(self, grad: Tensor) -> None:
        """One inside the range, and everything is inside."""
        self._weight.take(grad)


class Scaled:
    """A quantized weight whose scales (and zero points) are learned, and its codes if asked.

    Raises BadRequest for scales that are no plain numbers (GGUF's "K" types).
    """

    def __init__(self, q: QuantizedLinear, *, codes: bool = False) -> None:
        self.original = q
        self._scales = _Scales(q)
        self.leaves = dict(self._scales.leaves)
        if codes:
            self.leaves["code"] = decode(q.codes_OI, q.spec.grid)

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q, codes_OI = self.original, self.original.codes_OI
        if "code" in self.leaves:
            codes_OI = encode(self.leaves["code"], q.spec.grid)
        scale_RG, zero_RG = self._scales.scale(), self._scales.zero()
        return _carried(assemble(codes_OI, q.spec, scale_RG, zero_RG, q.global_scale), q)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return dequantize(self.result())

    def take(self, grad: Tensor) -> None:
        """The estimates of the module's docstring."""
        q, group = self.result(), self.original.spec.group
        scale_RG, zero_RG = self._scales.full_scale(), self._scales.zero()
        level_OI = decode(q.codes_OI, q.spec.grid)
        if "code" in self.leaves:
            position_OI = self.leaves["code"]
            low, high = _reach(q.spec.grid)
            inside_OI = (position_OI >= low) & (position_OI <= high)
            by_code_OI = expand(scale_RG, q.shape, group) * grad
            self.leaves["code"].grad = by_code_OI.mul_(inside_OI)
        by_zero_RG = None
        if zero_RG is not None:
            level_OI -= expand(zero_RG, q.shape, group)
            by_zero_RG = split(grad, group).sum(-1, dtype=torch.float32) * -scale_RG
        self._scales.take(split(level_OI.mul_(grad), group).sum(-1), by_zero_RG)


class Stepped:
    """A weight (O, I) behind the codes, rounded at learned scales: LSQ.

    Esser et al. 2020 (arXiv:1902.08153), equations 1 to 5; zero points as in LSQ+ (Bhalgat et al.
    2020, arXiv:2004.09576). With v = w / scale + zero point, and inside the grid or beyond it:

        d w~ / d scale  = level - v      | level - zero point
        d w~ / d zero   = 0              | -scale
        d w~ / d w      = 1              | 0

    The gradient of a scale is multiplied by 1 / sqrt(n Q), n weights sharing it and Q being the
    grid's largest value, as the paper does to keep its steps in proportion to the weights'.
    ``weight_OI``: the original weight, not the rounded one, at which the first line is nothing.
    Raises BadRequest as `Scaled`.
    """

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        self.original = q
        self._scales, self._weight = _Scales(q), _Weight(weight_OI, q)
        self.leaves = self._scales.leaves | {"code": self._weight.leaf}

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q, weight_OI = self.original, self._weight.value()
        if q.global_scale is not None:
            weight_OI /= q.global_scale
        scale_RG, zero_RG = self._scales.scale(), self._scales.zero()
        return _carried(quantize_to(weight_OI, q.spec, scale_RG, zero_RG, q.global_scale), q)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return dequantize(self.result())

    def take(self, grad: Tensor) -> None:
        """The three lines of the class's docstring."""
        q = self.result()
        grid, group = q.spec.grid, q.spec.group
        scale_RG, zero_RG = self._scales.full_scale(), self._scales.zero()
        level_OI = decode(q.codes_OI, grid)
        place_OI = self._weight.value() / expand(scale_RG, q.shape, group)
        if zero_RG is not None:
            level_OI -= expand(zero_RG, q.shape, group)  # from here on both without the zero point
        low, high = _ends(grid)
        shift: Tensor | float = 0.0 if zero_RG is None else expand(zero_RG, q.shape, group)
        inside_OI = (place_OI + shift > low) & (place_OI + shift < high)
        self._weight.take(grad * inside_OI)
        by_scale_OI = grad * torch.where(inside_OI, level_OI - place_OI, level_OI)
        per_scale = split(by_scale_OI, group)
        proportion = 1 / math.sqrt(per_scale.shape[-1] * grid.largest)
        by_zero_RG = None
        if zero_RG is not None:
            by_zero_RG = split(grad * ~inside_OI, group).sum(-1, dtype=torch.float32) * -scale_RG
        self._scales.take(per_scale.sum(-1) * proportion, by_zero_RG)


def _ends(grid: Grid) -> tuple[float, float]:
    """The first and the last value."""
    if isinstance(grid, IntGrid):
        return grid.lowest, grid.highest
    return -grid.largest, grid.largest


def _reach(grid: Grid) -> tuple[float, float]:
    """Positions that rounding, not clamping, puts on the grid."""
    low, high = _ends(grid)
    half = 0.5 if isinstance(grid, IntGrid) else 0.0
    return low - half, high + half


def _carried(q: QuantizedLinear, original: QuantizedLinear) -> QuantizedLinear:
    """With the parts of a layer that do not learn."""
    return replace(
        q,
        bias_O=original.bias_O,
        input_spec=original.input_spec,
        input_scale=original.input_scale,
    )
