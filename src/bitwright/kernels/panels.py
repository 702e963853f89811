"""Any layer, kept packed: some of its rows at a time are dequantized and multiplied.

For what has no kernel of its own. It is the specification, computed in parts: slow, and the
memory it takes is that of the codes and scales plus one panel.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitwright.formats.packing import pack, pack_nibbles, unpack, unpack_nibbles
from bitwright.numerics.groups import sides
from bitwright.schemes.quantized import QuantizedLinear, dequantize

PANEL = 1 << 20  # weights expanded at a time


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """``codes``: uint8 (O, I) for 8 bits, uint8 (O, I/2) for 4 bits and even I, otherwise int32
    words of `packing.pack`. The other tensors are those of a QuantizedLinear, in ``layer``, whose
    own codes are left out: (O, 0).
    """

    codes: Tensor
    layer: QuantizedLinear
    shape: tuple[int, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything held."""
        held = {name: value for name, value in vars(self.layer).items() if name != "codes_OI"}
        named = {"codes": self.codes} | held
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def pack_panels(q: QuantizedLinear) -> PanelWeight:
    """The layer with its codes in as many bits as they have, at most seven bits a row lost."""
    bits = q.spec.grid.bits
    if bits == 8:
        codes = q.codes_OI.clone()
    elif bits == 4 and q.shape[1] % 2 == 0:
        codes = pack_nibbles(q.codes_OI)
    else:
        codes = pack(q.codes_OI, bits)
    return PanelWeight(codes, replace(q, codes_OI=q.codes_OI[:, :0].clone()), q.shape)


def rows_of(w: PanelWeight, start: int, stop: int) -> QuantizedLinear:
    """Rows ``start`` to ``stop`` as a layer; ``start`` is a multiple of the rows of a scale."""
    q, bits, cols = w.layer, w.layer.spec.grid.bits, w.shape[1]
    part = w.codes[start:stop]
    if bits == 8:
        codes = part
    elif part.dtype == torch.uint8:
        codes = unpack_nibbles(part)
    else:
        codes = unpack(part, bits, cols)
    height = sides(w.shape, q.spec.group)[0]
    scales = slice(None) if height >= w.shape[0] else slice(start // height, -(-stop // height))
    return replace(
        q,
        codes_OI=codes,
        scale_RG=q.scale_RG[scales],
        zero_point_RG=None if q.zero_point_RG is None else q.zero_point_RG[scales],
        offset_RG=None if q.offset_RG is None else q.offset_RG[scales],
        bias_O=None if q.bias_O is None else q.bias_O[start:stop],
    )


def by_panels(x: Tensor, w: PanelWeight) -> Tensor:
    """x Wᵀ + bias for x of any leading shape, (..., I) -> (..., O), in ``x``'s dtype."""
    rows, cols = w.shape
    height = min(rows, sides(w.shape, w.layer.spec.group)[0])
    step = max(1, PANEL // (cols * height)) * height
    out = x.new_empty((*x.shape[:-1], rows))
    for start in range(0, rows, step):
        part = rows_of(w, start, min(start + step, rows))
        bias = None if part.bias_O is None else part.bias_O.to(x.dtype)
        out[..., start : start + step] = linear(x, dequantize(part, x.dtype), bias)
    return out
