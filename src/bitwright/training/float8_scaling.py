"""The scale of a tensor that is rounded to FP8 at every training step.

Current scaling takes it from the tensor itself. Delayed scaling takes it from the largest
magnitudes (amax) that the tensor had in earlier steps, so that rounding does not wait for a pass
over the tensor. The rule is the one in NVIDIA's Transformer Engine documentation (recipe
DelayedScaling): at every step, in this order,

1. amax = max(history), or history[0] with the algorithm "most_recent";
2. scale = (largest value of the format / amax) / 2^margin; an amax that is zero or not finite
   keeps the previous scale;
3. the history is rotated by one and its first slot zeroed;
4. the amax of this step's tensor is written into the first slot.

Two things differ from Transformer Engine. A tensor that was never seen is scaled by its own
amax, not by one. An amax that is not finite is left out of the history (and the layer falls back
for that step): a single overflow would otherwise freeze the scale for the length of the history.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.numerics.grids import E4M3, E5M2, FloatGrid

Scaling = Literal["delayed", "current"]
Formats = Literal["hybrid", "e4m3"]
Algorithm = Literal["max", "most_recent"]

TORCH_DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
LARGEST_SCALE = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Float8Recipe:
    """How tensors are scaled and rounded.

    ``scaling``: "delayed" from the amax history, "current" from the tensor itself.
    ``formats``: "hybrid" is E4M3 for inputs and weights and E5M2 for gradients, "e4m3" is E4M3
    for all. The other three belong to delayed scaling, but ``margin`` holds for both: scales are
    smaller by 2^margin, which leaves room for values that grow from one step to the next.
    Raises BadRequest for values out of range.
    """

    scaling: Scaling = "delayed"
    formats: Formats = "hybrid"
    history_length: int = 1024
    algorithm: Algorithm = "max"
    margin: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("scaling", ("delayed", "current")),
            ("formats", ("hybrid", "e4m3")),
            ("algorithm", ("max", "most_recent")),
        ):
            if getattr(self, name) not in known:
                raise BadRequest(
                    f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}"
                )
        if self.history_length < 1:
            raise BadRequest(f"history_length must be at least 1, not {self.history_length}")
        if not 0 <= self.margin <= 32:
            raise BadRequest(f"margin is a power of two from 0 to 32, not {self.margin}")

    @property
    def gradient_grid(self) -> FloatGrid:
        """The format of gradients; inputs and weights are always E4M3."""
        return E5M2 if self.formats == "hybrid" else E4M3


def scale_from_amax(amax: Tensor, previous: Tensor, largest: float, margin: int) -> Tensor:
    """(largest / amax) / 2^margin, or ``previous`` where amax is zero or not finite; float32.

    A scale too large for float32 (amax is subnormal) becomes the largest float32.
    """
    scale = ((largest / amax.float()) / 2.0**margin).clamp(max=LARGEST_SCALE)
    return torch.where((amax > 0) & torch.isfinite(amax), scale, previous)


def amax_of(history_L: Tensor, algorithm: Algorithm) -> Tensor:
    """The amax that a history stands for: its largest entry, or the one written last."""
    return history_L.amax() if algorithm == "max" else history_L[0].clone()


def rotated(history_L: Tensor) -> Tensor:
    """The history one step later: the oldest entry forgotten, the first slot zero."""
    later_L = torch.roll(history_L, -1)
    later_L[0] = 0
    return later_L


def to_float8(x: Tensor, scale: Tensor, grid: FloatGrid) -> Tensor:
    """x * scale, computed in float32, to the nearest FP8 value (ties to even), saturating.

    ``x``: any float dtype and shape; ``grid``: E4M3 or E5M2. NaN stays NaN. The result has
    the torch dtype of the grid.
    """
    largest = grid.largest
    return (x.float() * scale).clamp_(-largest, largest).to(TORCH_DTYPES[grid])


@dataclass(eq=False)
class TensorScale:
    """The scale of one tensor of one layer from step to step.

    ``history_L``: float32, one amax per step, this step's first. ``scale``: float32 scalar.
    ``seen``: whether an amax above zero was ever recorded. Current scaling uses none of it.
    """

    recipe: Float8Recipe
    grid: FloatGrid
    history_L: Tensor = field(init=False)
    scale: Tensor = field(init=False)
    seen: bool = False

    def __post_init__(self) -> None:
        self.history_L = torch.zeros(self.recipe.history_length)
        self.scale = torch.ones(())

    def advance(self, amax: Tensor, *, record: bool = True) -> Tensor:
        """The scale for a tensor of this (finite) ``amax``, float32 scalar.

        With ``record`` one step passes; without, nothing is remembered (evaluation).
        """
        recipe, largest = self.recipe, self.grid.largest
        self.history_L = self.history_L.to(amax.device)
        self.scale = self.scale.to(amax.device)
        if recipe.scaling == "current":
            return scale_from_amax(amax, torch.ones_like(amax), largest, recipe.margin)
        if not self.seen:
            scale = scale_from_amax(amax, self.scale, largest, recipe.margin)
        elif record:
            past = amax_of(self.history_L, recipe.algorithm)
            scale = scale_from_amax(past, self.scale, largest, recipe.margin)
        else:
            scale = self.scale
        if record:
            self.scale = scale
            self.history_L = rotated(self.history_L)
            self.history_L[0] = amax
            self.seen = self.seen or bool(amax > 0)
        return scale

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue."""
        return {"history": self.history_L, "scale": self.scale, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`; raises BadRequest if the history has another length."""
        if state["history"].shape != self.history_L.shape:
            raise BadRequest(
                f"the saved amax history has {len(state['history'])} slots, the recipe "
                f"{len(self.history_L)}: use the recipe it was saved with"
            )
        self.history_L, self.scale = state["history"].clone(), state["scale"].clone()
        self.seen = bool(state["seen"])
