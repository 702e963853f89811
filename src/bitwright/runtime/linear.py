"""A Linear that keeps its weight packed and multiplies it as it is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import BadRequest
from bitwright.kernels.dispatch import Packed, interpreted, pack, product, rounds_inputs
from bitwright.kernels.layouts import CpuWeight, EightBitWeight, GpuWeight
from bitwright.kernels.panels import PanelWeight
from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme


class PackedLinear(nn.Module):
    """In place of nn.Linear: codes and scales in memory, no 16-bit weight; inputs rounded as the
    layer says.

    Packed for the kernel of ``device``, and left where ``q`` is; `to` moves it there and changes
    no dtype. Layers without a kernel (`kernels.dispatch.why_not`) are dequantized a panel at a
    time in every call. Raises BadRequest when moved to a device its kernel is not for.
    """

    input_scale: Tensor | None

    def __init__(
        self,
        q: QuantizedLinear,
        bias_O: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        packed = pack(replace(q, bias_O=q.bias_O if bias_O is None else bias_O), device)
        self.out_features, self.in_features = q.shape
        self.scheme = Scheme(q.spec, q.input_spec)
        self.input_spec = None if rounds_inputs(packed) else q.input_spec
        self._hold(packed)
        if self.input_spec is not None:
            self.register_buffer("input_scale", q.input_scale)

    def _hold(self, packed: Packed) -> None:
        self._packed = packed
        for name, tensor in tensors_of(packed).items():
            self.register_buffer(name, tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Follow a move to another device; a change of dtype concerns activations only."""
        here = next(iter(tensors_of(self._packed).values())).device
        device = fn(torch.empty(0, dtype=torch.int32, device=here)).device
        kind = kernel_of(self._packed)
        if kind not in (None, device.type) and device.type != "meta" and not interpreted():
            raise BadRequest(
                f"this layer is packed for {kind} and cannot run on {device}: load the model with "
                f"device={device.type!r}"
            )
        self._hold(moved(self._packed, device))
        if self.input_spec is not None and self.input_scale is not None:
            self.input_scale = self.input_scale.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, in ``x``'s dtype."""
        if self.input_spec is not None:
            x = round_input(x, self.input_spec, self.input_scale)
        return product(x, self._packed)

    @property
    def by_panels(self) -> bool:
        """Whether there is no kernel: the weight is dequantized in parts in every call."""
        return isinstance(self._packed, PanelWeight)

    def extra_repr(self) -> str:
        """For printing the model."""
        kind = type(self._packed).__name__
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.scheme.name}, {kind}"
        )


def tensors_of(packed: Packed | QuantizedLinear) -> dict[str, Tensor]:
    """Every tensor of a packed layer by name."""
    held = packed.tensors if isinstance(packed, PanelWeight) else vars(packed)
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def moved(packed: Packed, device: torch.device) -> Packed:
    """A packed layer on another device, dtypes as they are."""
    if isinstance(packed, PanelWeight):
        parts = {name: tensor.to(device) for name, tensor in tensors_of(packed.layer).items()}
        layer: Any = replace(packed.layer, **parts)  # type: ignore[arg-type]
        return replace(packed, codes=packed.codes.to(device), layer=layer)
    tensors: Any = {name: tensor.to(device) for name, tensor in tensors_of(packed).items()}
    return replace(packed, **tensors)


def kernel_of(packed: Packed) -> str | None:
    """The kind of device a packed layer's kernel runs on: "cpu", "cuda", or None for any."""
    if isinstance(packed, PanelWeight):
        return None
    on_gpu = isinstance(packed, GpuWeight) or (isinstance(packed, EightBitWeight) and packed.on_gpu)
    assert on_gpu or isinstance(packed, (CpuWeight, EightBitWeight))
    return "cuda" if on_gpu else "cpu"
