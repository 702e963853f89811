"""A Linear that keeps its weight packed and multiplies it as it is."""

from dataclasses import replace

from torch import Tensor, nn

from bitwright.kernels.cpu_w8a8 import Int8Weight
from bitwright.kernels.dispatch import pack, product
from bitwright.schemes.quantized import QuantizedLinear


class PackedLinear(nn.Module):
    """In place of nn.Linear: codes and scales in memory, no 16-bit weight; inputs rounded as the
    layer says.

    Raises BadRequest where no kernel takes the layer (`kernels.dispatch.why_not`).
    """

    def __init__(self, q: QuantizedLinear, bias_O: Tensor | None = None) -> None:
        super().__init__()
        packed = pack(replace(q, bias_O=q.bias_O if bias_O is None else bias_O))
        self.out_features, self.in_features = q.shape
        for name, tensor in vars(packed).items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name, tensor)
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, in ``x``'s dtype."""
        return product(x, self._packed)

    def extra_repr(self) -> str:
        """For printing the model."""
        kind = "W8A8" if isinstance(self._packed, Int8Weight) else "W4"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"
