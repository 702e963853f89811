"""The block types of GGUF: 32 neighbouring weights of a row and their scale, as bytes.

| type | bytes | holds                                            | weight        |
|------|-------|--------------------------------------------------|---------------|
| Q4_0 | 18    | d float16, 16 bytes of nibbles                   | d * (q - 8)   |
| Q4_1 | 20    | d, m float16, 16 bytes of nibbles                | d * q + m     |
| Q5_0 | 22    | d float16, 4 bytes of fifth bits, 16 of nibbles  | d * (q - 16)  |
| Q5_1 | 24    | d, m float16, 4 bytes of fifth bits, 16          | d * q + m     |
| Q8_0 | 34    | d float16, 32 int8                               | d * q         |

Q4_K, Q5_K and Q6_K, whose scales are multiples of a unit per 256 weights, are laid out in
`packing_k.py`. A row whose width is no multiple of 256 gets the type that llama.cpp falls back to.

Nibble j of a block's low half is weight j, of its high half weight j + 16. Codes and scales are
written as they are; a scale of either sign is allowed. The zero point z of an asymmetric group
becomes m = -z * d, rounded to float16: at most z * 2^-11 of a step away. A group of several times
32 weights is written as so many blocks of one scale.

The tensors made here are parts of a GGUF file; `runtime/gguf_export.py` writes the file.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bitwright.errors import BadCheckpoint, BadRequest, BadShape
from bitwright.formats.packing import pack_halves, unpack_halves
from bitwright.formats.packing_k import (
    pack_factors,
    pack_fifth_bits,
    pack_pairs,
    pack_six,
    unpack_factors,
    unpack_fifth_bits,
    unpack_pairs,
    unpack_six,
)
from bitwright.formats.weights_only import WeightsOnly
from bitwright.numerics.grids import IntGrid
from bitwright.numerics.groups import scale_shape, sides
from bitwright.numerics.super_blocks import SUPER, units_and_factors
from bitwright.schemes.quantized import QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec, parse_scheme

BLOCK = 32
TYPES = {
    (4, False): "Q4_0", (4, True): "Q4_1", (5, False): "Q5_0", (5, True): "Q5_1",
    (8, False): "Q8_0",
}  # fmt: skip
BLOCK_SHAPES = {  # weights and bytes
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_FALLBACKS = {4: (5, False), 5: (5, True), 6: (8, False)}  # bits to (bits, asymmetric)
BLOCKS = ".gguf_blocks"


class Gguf(WeightsOnly):
    """The Format of `--format gguf`: the tensors of its quantized layers."""

    name = "gguf"
    scale_dtype = torch.float16
    group_size = BLOCK
    symmetric = True

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """Q5_0, Q5_1 and Q8_0 for Q4_K, Q5_K and Q6_K where 256 does not divide the width."""
        spec = scheme.weight
        if not spec.super_blocks or shape[1] % SUPER == 0:
            return scheme
        bits, asymmetric = _FALLBACKS[spec.grid.bits]
        grid = IntGrid(bits, signed=not asymmetric)
        return Scheme(Spec(grid, (1, BLOCK), self.scale_dtype, asymmetric))

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Super-blocks; W4, W5 and symmetric W8 integers in groups of a multiple of 32."""
        spec = scheme.weight
        if spec.super_blocks and shape[1] % SUPER == 0:
            return
        if scheme.input is not None or scheme.kv_cache is not None:
            raise BadRequest(f"{name}: gguf stores weights only, not {scheme.name}")
        if not isinstance(spec.grid, IntGrid) or spec.group[0] != 1:
            raise BadRequest(f"{name}: gguf stores integers, not {scheme.name}")
        if (spec.grid.bits, spec.asymmetric) not in TYPES:
            kind = f"asymmetric {scheme.name}" if spec.asymmetric else scheme.name
            raise BadRequest(f"{name}: gguf stores W4, W5 and symmetric W8 integers, not {kind}")
        try:
            scale_shape(shape, spec.group)
        except BadShape as error:
            raise BadShape(f"{name}: {error}") from error
        if sides(shape, spec.group)[1] % BLOCK:
            raise BadShape(
                f"{name}: gguf has blocks of 32 weights, which groups of "
                f"{sides(shape, spec.group)[1]} do not fill: choose --group-size 32"
            )

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """``name.gguf_blocks`` uint8 (O, bytes of a row); the bias as it is."""
        tensors = {f"{name}{BLOCKS}": blocks(q)}
        if q.bias_O is not None:
            tensors[f"{name}.bias"] = q.bias_O
        return tensors

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Read one layer back, in groups of 32. Raises BadCheckpoint if its tensor is damaged."""
        try:
            data, kind = tensors[f"{name}{BLOCKS}"], config["types"][name]
        except KeyError as error:
            raise BadCheckpoint(f"layer {name} lacks its tensor or type {error}") from None
        if kind not in BLOCK_SHAPES or data.shape[1] % BLOCK_SHAPES[kind][1]:
            raise BadCheckpoint(f"layer {name} is not made of {kind} blocks")
        bias_O = tensors.get(f"{name}.bias")
        if BLOCK_SHAPES[kind][0] == SUPER:
            return _read_super(data, kind, bias_O)
        return _read(name, data, kind, bias_O)

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """Layers that have blocks."""
        return {name.removesuffix(BLOCKS) for name in tensor_names if name.endswith(BLOCKS)}

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """The type of every layer."""
        types = {name: type_of(scheme) for name, scheme in layers.items()}
        return {"quant_method": "gguf", "types": types, "ignore": ignored}

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The ``ignore`` list."""
        return list(config.get("ignore") or [])

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """None."""
        return {}


def type_of(scheme: Scheme) -> str:
    """GGUF's name for a scheme that `Gguf.check` accepts."""
    spec = scheme.weight
    return scheme.name if spec.super_blocks else TYPES[spec.grid.bits, spec.asymmetric]


def blocks(q: QuantizedLinear) -> Tensor:
    """uint8 (O, bytes of a row): the blocks of every row, one after the other."""
    if q.spec.super_blocks:
        return _super_blocks(q)
    bits, rows = q.spec.grid.bits, q.shape[0]
    codes = q.codes_OI.reshape(-1, BLOCK)
    repeated = q.shape[1] // q.scale_RG.shape[1] // BLOCK
    scale = q.scale_RG.repeat_interleave(repeated, 1).reshape(-1, 1)
    parts = [scale.view(torch.uint8)]
    if q.zero_point_RG is not None:
        zero = q.zero_point_RG.repeat_interleave(repeated, 1).reshape(-1, 1)
        parts.append((-zero.float() * scale.float()).to(torch.float16).view(torch.uint8))
    if bits == 8:
        parts.append(codes ^ 0x80)  # offset-binary to two's complement
    else:
        if bits == 5:
            parts.append(_fifth_bits(codes))
        parts.append(pack_halves(codes & 15))
    return torch.cat(parts, 1).reshape(rows, -1)


def _read(name: str, data: Tensor, kind: str, bias_O: Tensor | None) -> QuantizedLinear:
    rows = len(data)
    bits, asymmetric = next(key for key, value in TYPES.items() if value == kind)
    block = data.reshape(-1, BLOCK_SHAPES[kind][1])
    scale = block[:, :2].contiguous().view(torch.float16)
    at, zero = 2, None
    if asymmetric:
        offset = block[:, 2:4].contiguous().view(torch.float16)
        exact = -offset.float() / scale.float()
        zero, at = exact.round(), 4
        if not bool(((exact - zero).abs() <= 0.05).all()):
            raise BadCheckpoint(f"layer {name} has offsets that are no zero points")
    if bits == 8:
        codes = block[:, at:] ^ 0x80
    else:
        codes = unpack_halves(block[:, -16:])
        if bits == 5:
            codes = codes | _spread_bits(block[:, at : at + 4]) << 4
    return QuantizedLinear(
        codes_OI=codes.reshape(rows, -1),
        scale_RG=scale.reshape(rows, -1),
        spec=Spec(IntGrid(bits, not asymmetric), (1, BLOCK), torch.float16, asymmetric),
        zero_point_RG=None if zero is None else zero.to(torch.uint8).reshape(rows, -1),
        bias_O=bias_O,
    )


def _fifth_bits(codes: Tensor) -> Tensor:
    """(N, 32) codes -> (N, 4) bytes: bit i of the little-endian word is the fifth bit of code i."""
    bit = (codes >> 4 & 1).reshape(-1, 4, 8)
    return (bit << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def _spread_bits(words: Tensor) -> Tensor:
    """Inverse of `_fifth_bits`: (N, 4) bytes -> (N, 32) bits."""
    return (words[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(len(words), -1)


def _super_blocks(q: QuantizedLinear) -> Tensor:
    assert isinstance(q.spec.scale, IntGrid)
    rows, bits = q.shape[0], q.spec.grid.bits
    codes = q.codes_OI.reshape(-1, SUPER)
    unit, factor = units_and_factors(q.scale_RG.reshape(len(codes), -1), q.spec.scale)
    if q.offset_RG is None:
        lower, upper = pack_six(codes)
        signs = factor.to(torch.int8).view(torch.uint8)
        parts = [lower, upper, signs, unit.view(torch.uint8)]
    else:
        below, count = units_and_factors(q.offset_RG.reshape(len(codes), -1), q.spec.scale)
        parts = [unit.view(torch.uint8), below.view(torch.uint8), pack_factors(factor, count)]
        if bits == 5:
            parts.append(pack_fifth_bits(codes))
        parts.append(pack_pairs(codes & 15))
    return torch.cat(parts, 1).reshape(rows, -1)


def _read_super(data: Tensor, kind: str, bias_O: Tensor | None) -> QuantizedLinear:
    rows = len(data)
    block = data.reshape(-1, BLOCK_SHAPES[kind][1])
    offset = None
    if kind == "Q6_K":
        codes = unpack_six(block[:, :128], block[:, 128:192])
        factor = block[:, 192:208].contiguous().view(torch.int8)
        unit = block[:, 208:].contiguous().view(torch.float16)
    else:
        units = block[:, :4].contiguous().view(torch.float16).float()
        unit = units[:, :1]
        factor, count = unpack_factors(block[:, 4:16])
        offset = (units[:, 1:] * count).reshape(rows, -1)
        codes = unpack_pairs(block[:, -128:])
        if kind == "Q5_K":
            codes = codes | unpack_fifth_bits(block[:, 16:48])
    return QuantizedLinear(
        codes_OI=codes.reshape(rows, -1),
        scale_RG=(unit.float() * factor).reshape(rows, -1),
        spec=parse_scheme(kind).weight,
        bias_O=bias_O,
        offset_RG=offset,
    )
