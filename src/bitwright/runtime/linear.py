"""A Linear that keeps its weight packed and multiplies it as it is."""

from dataclasses import replace

from torch import Tensor, nn

from bitwright.kernels.dispatch import pack, product, rounds_inputs
from bitwright.kernels.panels import PanelWeight
from bitwright.schemes.inputs import round_input
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme


class PackedLinear(nn.Module):
    """In place of nn.Linear: codes and scales in memory, no 16-bit weight; inputs rounded as the
    layer says.

    Layers without a kernel (`kernels.dispatch.why_not`) are dequantized a panel at a time in
    every call.
    """

    input_scale: Tensor | None

    def __init__(self, q: QuantizedLinear, bias_O: Tensor | None = None) -> None:
        super().__init__()
        packed = pack(replace(q, bias_O=q.bias_O if bias_O is None else bias_O))
        self.out_features, self.in_features = q.shape
        held = packed.tensors if isinstance(packed, PanelWeight) else vars(packed)
        for name, tensor in held.items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor)
        self.scheme = Scheme(q.spec, q.input_spec)
        self.input_spec = None if rounds_inputs(packed) else q.input_spec
        if self.input_spec is not None:
            self.register_buffer("input_scale", q.input_scale)
        self._packed = packed

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
