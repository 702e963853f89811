"""A Linear that keeps its weight packed and multiplies it as it is."""

from dataclasses import replace

from torch import Tensor, nn

from bitwright.kernels.dispatch import pack, product
from bitwright.schemes.quantized import QuantizedLinear


class PackedLinear(nn.Module):
    """In place of nn.Linear: 4-bit codes and scales in memory, no 16-bit weight.

    Raises BadRequest where no kernel takes the layer (`kernels.dispatch.why_not`).
    """

    def __init__(self, q: QuantizedLinear, bias_O: Tensor | None = None) -> None:
        super().__init__()
        packed = pack(replace(q, bias_O=q.bias_O if bias_O is None else bias_O))
        self.out_features, self.in_features = q.shape
        self.register_buffer("words_TKJL", packed.words_TKJL)
        self.register_buffer("scale_TGN", packed.scale_TGN)
        self._packed = packed

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, in ``x``'s dtype."""
        return product(x, self._packed)

    def extra_repr(self) -> str:
        """For printing the model."""
        size = self._packed.group_size
        return f"in_features={self.in_features}, out_features={self.out_features}, W4 g{size}"
