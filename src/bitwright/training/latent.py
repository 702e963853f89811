"""What is learned behind each parameter of a model whose weights are quantized.

The model in training is the very model a checkpoint loads as: every parameter holds a rounded
value. Behind it stands a latent, in float32, which the optimizer moves. A step is

    parameter <- latent.value()          rounding
    parameter.grad from the loss         the ordinary backward pass of an ordinary model
    latent.take(parameter.grad)          gradients of the latent's own numbers
    optimizer step on those

so the forward pass in training is that of the exported checkpoint, bit for bit, and data
parallelism sees nothing but ordinary parameters.

Gradients through rounding are straight-through estimates. With level = code - zero point, a weight
is w~ = level * scale, level = round(w / scale) clamped to the grid, and

    d w~ / d w      = 1 inside the grid, 0 where it clamps
    d w~ / d scale  = level - w / scale inside, level where it clamps

the latter as in LSQ (Esser et al. 2020, arXiv:1902.08153, equation 3). One learning rate has to fit
all leaves of a kind, whatever the size of a model's weights: scales are learned as logarithms, and
weights in units of the scale they start with, so a learning rate of 0.01 moves a weight by a
hundredth of a code per step.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.methods.rtn import rounded, rtn
from bitwright.numerics.compiled import step_gradients
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import expand, join, split
from bitwright.numerics.rounding import decode
from bitwright.numerics.scales import project, store_scale
from bitwright.schemes.quantized import (
    QuantizedLinear,
    assemble,
    dequantize,
    grouped,
    quantize_to,
)


class Latent(Protocol):
    """The learned numbers behind one parameter."""

    @property
    def leaves(self) -> Mapping[str, Tensor]:
        """Float32 tensors by kind ("weight", "scale", "zero", "plain"); `take` fills .grad."""
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

    LLM-QAT's choice (section 3.3.1: clipping outliers hurts). Works for every grid.
    """

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        self.original = q
        self.unit_RG = _unit(q)
        self.leaves = {"weight": weight_OI.detach().float() / self._unit_per_weight()}

    def _unit_per_weight(self) -> Tensor:
        return expand(self.unit_RG, self.original.shape, self.original.spec.group)

    def _float_weight(self) -> Tensor:
        return self.leaves["weight"] * self._unit_per_weight()

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q = rtn(self._float_weight(), None, self.original.spec, search="absmax")
        return _carried(q, self.original)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return rounded(self._float_weight(), self.original.spec, search="absmax")

    def take(self, grad: Tensor) -> None:
        """One inside the range, and everything is inside."""
        self.leaves["weight"].grad = grad * self._unit_per_weight()


class FixedCodes:
    """A weight whose codes stay as they are, its scales (and zero points) learned.

    Raises BadRequest for scales that are no plain numbers (GGUF's "K" types).
    """

    def __init__(self, q: QuantizedLinear) -> None:
        _require_plain(q)
        self.original = q
        scale_RG = q.scale_RG.float()
        self.sign_RG = torch.where(scale_RG < 0, -1.0, 1.0)
        self.leaves = {"scale": scale_RG.abs().log()}
        if q.zero_point_RG is not None:
            self.leaves["zero"] = q.zero_point_RG.float()

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q = self.original
        scale_RG, zero_RG = _scale(self), _zero(self)
        return _carried(assemble(q.codes_OI, q.spec, scale_RG, zero_RG, q.global_scale), q)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        return dequantize(self.result())

    def take(self, grad: Tensor) -> None:
        """A weight is linear in its scale and in its zero point."""
        q, group = self.original, self.original.spec.group
        level_OI = decode(q.codes_OI, q.spec.grid)
        scale_RG, zero_RG = _scale(self), _zero(self)
        if zero_RG is not None:
            level_OI -= expand(zero_RG, q.shape, group)
            by_zero_RG = split(grad, group).sum(-1, dtype=torch.float32) * -scale_RG
            self.leaves["zero"].grad = by_zero_RG
        unit = 1.0 if q.global_scale is None else float(q.global_scale)
        by_scale_RG = split(level_OI.mul_(grad), group).sum(-1) * unit
        self.leaves["scale"].grad = by_scale_RG * scale_RG  # of its logarithm


class Steps:
    """A weight (O, I) with learned scales (and zero points) on a grid of integers: LSQ.

    Raises BadRequest for other grids and for GGUF's "K" types: those train with `MinMax`.
    """

    def __init__(self, weight_OI: Tensor, q: QuantizedLinear) -> None:
        _require_plain(q)
        if not isinstance(q.spec.grid, IntGrid):
            raise BadRequest("step sizes are learned for integers: use --step-sizes minmax")
        self.original, self.grid = q, q.spec.grid
        scale_RG = q.scale_RG.float()
        self.sign_RG = torch.where(scale_RG < 0, -1.0, 1.0)
        self.unit_RG = _unit(q)
        self.leaves = {
            "weight": weight_OI.detach().float() / self._unit_per_weight(),
            "scale": scale_RG.abs().log(),
        }
        if q.zero_point_RG is not None:
            self.leaves["zero"] = q.zero_point_RG.float()

    def _unit_per_weight(self) -> Tensor:
        return expand(self.unit_RG, self.original.shape, self.original.spec.group)

    def _float_weight(self) -> Tensor:
        return self.leaves["weight"] * self._unit_per_weight()

    def result(self) -> QuantizedLinear:
        """The layer as it would be stored now."""
        q = self.original
        return _carried(quantize_to(self._float_weight(), q.spec, _scale(self), _zero(self)), q)

    def value(self) -> Tensor:
        """The dequantized weight, float32."""
        scale_N1, zero_RG = _scale(self).reshape(-1, 1), _zero(self)
        zero_N1 = None if zero_RG is None else zero_RG.reshape(-1, 1)
        groups_NC = grouped(self._float_weight(), self.original.spec)
        values_NC = project(groups_NC, scale_N1, zero_N1, self.grid)
        return join(values_NC, self.original.shape, self.original.spec.group)

    def take(self, grad: Tensor) -> None:
        """The estimates of the module's docstring, by scale, zero point and weight."""
        spec, shape = self.original.spec, self.original.shape
        scale_RG, zero_RG = _scale(self), _zero(self)
        zero_N1 = torch.zeros_like(scale_RG) if zero_RG is None else zero_RG
        grad_NC = grouped(grad.float(), spec).clone()  # changed in place
        by_scale_N, by_zero_N = step_gradients(
            grouped(self._float_weight(), spec).contiguous().numpy(),
            grad_NC.numpy(),
            scale_RG.reshape(-1, 1).numpy(),
            zero_N1.reshape(-1, 1).numpy(),
            float(self.grid.lowest),
            float(self.grid.highest),
        )
        self.leaves["weight"].grad = join(grad_NC, shape, spec.group) * self._unit_per_weight()
        # d loss / d log|scale| = scale * d loss / d scale
        by_scale_RG = torch.from_numpy(by_scale_N).view_as(scale_RG)
        self.leaves["scale"].grad = by_scale_RG * scale_RG
        if zero_RG is not None:
            self.leaves["zero"].grad = torch.from_numpy(by_zero_N).view_as(zero_RG)


def _unit(q: QuantizedLinear) -> Tensor:
    """What a weight's first code step is worth, float32 (R, G)."""
    scale_RG = q.scale_RG.float().abs()
    return scale_RG if q.global_scale is None else scale_RG * q.global_scale


def _require_plain(q: QuantizedLinear) -> None:
    if q.spec.super_blocks or q.group_of_column_I is not None:
        raise BadRequest("scales of this layout cannot be learned: use W4A16, Q4_0 or the like")


def _carried(q: QuantizedLinear, original: QuantizedLinear) -> QuantizedLinear:
    """With the parts of a layer that do not learn."""
    return replace(
        q,
        bias_O=original.bias_O,
        input_spec=original.input_spec,
        input_scale=original.input_scale,
    )


def _scale(latent: FixedCodes | Steps) -> Tensor:
    """The scale at the precision it is stored in, float32."""
    return store_scale(latent.sign_RG * latent.leaves["scale"].exp(), latent.original.spec.scale)


def _zero(latent: FixedCodes | Steps) -> Tensor | None:
    if "zero" not in latent.leaves:
        return None
    grid = latent.original.spec.grid
    assert isinstance(grid, IntGrid)
    return latent.leaves["zero"].round().clamp_(grid.lowest, grid.highest)
