"""A QuantizedLinear's codes, reordered into what the kernels load: pure functions over tensors.

Codes keep the bits they have, whatever format the checkpoint had. CPUs look up the value of any
grid of at most 16 values in ``table``; GPUs compute those of integers of 4 or 8 bits and of E2M1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.numerics.grids import E2M1, E4M3, E8M0, IntGrid, values
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, PER_TOKEN
from bitwright.numerics.rounding import decode
from bitwright.schemes.quantized import QuantizedLinear

LANES = 64  # output channels of one CPU tile: four vectors of 16
WORDS = 32  # 16-bit words of one channel in one GPU block
BLOCK = 128  # rows and columns of a block of FP8 weights
LOCKS = 1024  # output tiles of a GPU product that may share their columns out
STEP = 8  # input columns of one 16-byte row of a CPU tile


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """4-bit weights in the order of AVX-512 BF16 dot products.

    ``words_TKJL``: int16 (tiles, I / 8, 4, 32). Lane 2 c + h of vector j of tile t holds output
    channel 64 t + 16 j + c; its nibble s is input column 8 k + 2 s + h, so that one shift and
    one table look-up of a whole vector give 32 bfloat16 in dot-product order.
    ``scale_TGN``: (tiles, G, 64) bfloat16, float16 or float32; ``zero_TGN``: uint8 or None.
    ``table``: bfloat16 (16,). ``factor``: multiplies the product (a two-level spec's scale).
    ``order_I``: int64, the input's columns in stored order, None where it is the usual one.
    """

    words_TKJL: Tensor
    scale_TGN: Tensor
    zero_TGN: Tensor | None
    table: Tensor
    bias_O: Tensor | None
    order_I: Tensor | None
    shape: tuple[int, int]
    group_size: int
    factor: float


@dataclass(frozen=True, eq=False)
class GpuWeight:
    """4- or 8-bit weights in the order the Triton kernel loads them.

    ``words_BOS``: int16 (blocks, O, 32). Code j of word s of block b is input column
    ``block`` b + 32 j + s, where a block is 128 columns of 4 bits or 64 of 8: a tile of words read
    in a tensor core's operand order, shifted, is the operand of 32 neighbouring columns. A tile of
    a block's channels is one contiguous piece of memory. Columns are padded with code 0.
    ``scale_GO``: (G, O), 16 bits or float32, neighbours are channels; ``zero_GO``: int16 or None,
    ``middle`` is subtracted where it is None; ``middle`` is None for E2M1 codes. ``locks``: int32
    zeros, the kernel's counters. ``factor``: the scale of the whole tensor.
    """

    words_BOS: Tensor
    scale_GO: Tensor
    zero_GO: Tensor | None
    locks: Tensor
    bias_O: Tensor | None
    order_I: Tensor | None
    shape: tuple[int, int]
    group_size: int
    middle: int | None
    factor: float = 1.0
    bits: int = 4

    @property
    def block(self) -> int:
        """Input columns of one block."""
        return WORDS * 16 // self.bits


@dataclass(frozen=True, eq=False)
class EightBitWeight:
    """``codes_OI``: int8 or float8_e4m3fn. ``scale``: float32 (O,), or (ceil(O/128), ceil(I/128)).

    ``bias_O``: float32 or None. ``input_scale``: float32 (1,), None where it is found per token
    (and per 128 columns, where the weight has blocks). ``on_gpu``: whose kernel it is for.
    """

    codes_OI: Tensor
    scale: Tensor
    bias_O: Tensor | None = None
    input_scale: Tensor | None = None
    on_gpu: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return (self.codes_OI.shape[0], self.codes_OI.shape[1])


def why_not_eight_bits(q: QuantizedLinear) -> str:
    """Why no W8A8 kernel can hold this layer; "" if one can."""
    spec, inputs = q.spec, q.input_spec
    if inputs is None or spec.grid != inputs.grid or spec.grid not in (IntGrid(8), E4M3):
        return "weights and inputs are not both INT8 or both E4M3"
    if spec.asymmetric or not isinstance(spec.scale, torch.dtype):
        return "its weights have zero points, or scales that are not floats"
    if inputs.scale != torch.float32 or inputs.asymmetric:
        return "its inputs have no symmetric float32 scales"
    if spec.group == (BLOCK, BLOCK):
        fits = inputs.mode == "dynamic" and inputs.group == (1, BLOCK) and q.shape[1] % BLOCK == 0
        return "" if fits else "its inputs have no scale per token and 128 columns"
    if spec.group not in (PER_CHANNEL, PER_TENSOR):
        return "its weights have no scale per channel, tensor or 128 x 128 block"
    if inputs.mode == "dynamic" and inputs.group != PER_TOKEN:
        return "its inputs have no scale per token"
    return ""


def pack_eight_bits(q: QuantizedLinear) -> EightBitWeight:
    """The storage of W8A8 kernels, where ``q`` is; `why_not_eight_bits` must be empty."""
    integers = isinstance(q.spec.grid, IntGrid)
    if integers:
        codes = decode(q.codes_OI, q.spec.grid, torch.int16).to(torch.int8)
    else:
        codes = q.codes_OI.view(torch.float8_e4m3fn)
    scale = q.scale_RG.float()
    if q.spec.group != (BLOCK, BLOCK):
        scale = scale.flatten().expand(q.shape[0])
    static = q.input_spec is not None and q.input_spec.mode == "static"
    return EightBitWeight(
        codes_OI=codes.contiguous(),
        scale=scale.contiguous(),
        bias_O=None if q.bias_O is None else q.bias_O.float(),
        input_scale=q.input_scale.float() if static and q.input_scale is not None else None,
    )


def why_not_packed(q: QuantizedLinear, bits: int = 4) -> str:
    """Why no kernel of up to ``bits`` bits can hold this layer; "" if one can."""
    spec = q.spec
    if spec.grid.bits > bits:
        return f"its weights have {spec.grid.bits} bits"
    if q.input_spec is not None:
        return "its input is rounded too"
    if q.offset_RG is not None or spec.super_blocks:
        return "super-blocks have offsets of their own"
    if spec.group[0] != 1:
        return "its groups span several rows"
    if (q.shape[1] if spec.group[1] == -1 else spec.group[1]) % STEP:
        return f"its group size is no multiple of {STEP}"
    if q.group_of_column_I is not None:
        sizes = torch.bincount(q.group_of_column_I, minlength=q.scale_RG.shape[1])
        if int(sizes.min()) != int(sizes.max()):
            return "its groups have different sizes"
    return ""


def pack_for_cpu(q: QuantizedLinear) -> CpuWeight:
    """The CPU kernel's storage; `why_not_packed` must be empty. O is padded to 64 channels."""
    codes_OI, order_I = _ordered(q)
    rows, cols = q.shape
    tiles = -(-rows // LANES)
    full = pad(codes_OI, (0, 0, 0, tiles * LANES - rows))
    words = torch.empty(tiles, cols // STEP, 4, 32, dtype=torch.int16)
    for t in range(tiles):  # tile by tile: a layer's codes are never held twice
        tile = full[t * LANES : (t + 1) * LANES].to(torch.int16)
        nibbles = tile.reshape(4, 16, cols // STEP, 4, 2)  # J C K S H
        word = sum(
            (nibbles[:, :, :, s] << (4 * s) for s in range(4)), torch.zeros((), dtype=torch.int16)
        )
        words[t] = word.permute(2, 0, 1, 3).reshape(cols // STEP, 4, 32)
    return CpuWeight(
        words_TKJL=words,
        scale_TGN=_tiled(_stored_scale(q, (torch.bfloat16, torch.float16, torch.float32)), tiles),
        zero_TGN=None if q.zero_point_RG is None else _tiled(q.zero_point_RG, tiles),
        table=_table(q),
        bias_O=None if q.bias_O is None else q.bias_O.float(),
        order_I=order_I,
        shape=q.shape,
        group_size=_group_size(q),
        factor=1.0 if q.global_scale is None else float(q.global_scale),
    )


def unpack_cpu_rows(w: CpuWeight, first: int, last: int) -> Tensor:
    """Tiles ``first`` to ``last`` dequantized: float32 (64 (last - first), I), columns as stored.

    What the compiled kernel computes, as tensor operations; the factor is left out.
    """
    words = w.words_TKJL[first:last]
    tiles, steps = words.shape[:2]
    shifts = torch.arange(0, 16, 4, dtype=torch.int32)
    codes = (words.to(torch.int32).unsqueeze(-1) >> shifts) & 15  # T K J L S
    codes = codes.reshape(tiles, steps, 4, 16, 2, 4).permute(0, 2, 3, 1, 5, 4)
    value = w.table.float()[codes.reshape(tiles, LANES, -1, w.group_size)]  # T N G C
    if w.zero_TGN is not None:
        value -= w.zero_TGN[first:last].transpose(1, 2).unsqueeze(-1).float()
    value *= w.scale_TGN[first:last].transpose(1, 2).unsqueeze(-1).float()
    return value.reshape(tiles * LANES, steps * STEP)


def why_not_on_gpu(q: QuantizedLinear) -> str:
    """Why the Triton kernel cannot hold this layer; "" if it can."""
    if reason := why_not_packed(q, 8):
        return reason
    if not isinstance(q.spec.grid, IntGrid) and q.spec.grid != E2M1:
        return "its grid is neither integers nor E2M1"
    size, block = _group_size(q), WORDS * 16 // _stored_bits(q)
    if size not in (16, 32, 64) and size % block and size != q.shape[1]:
        return f"its group size {size} is not 16, 32, 64, a multiple of {block} or the whole row"
    return ""


def pack_for_gpu(q: QuantizedLinear) -> GpuWeight:
    """The Triton kernel's storage, where ``q`` is; `why_not_on_gpu` must be empty."""
    codes_OI, order_I = _ordered(q)
    (rows, cols), bits = q.shape, _stored_bits(q)
    places = 16 // bits
    blocks = -(-cols // (WORDS * places))
    full = pad(codes_OI, (0, blocks * WORDS * places - cols)).to(torch.int16)
    codes = full.reshape(rows, blocks, places, WORDS)  # O B J S
    words = torch.zeros(rows, blocks, WORDS, dtype=torch.int16, device=full.device)
    for j in range(places):
        words |= codes[:, :, j] << (bits * j)
    grid = q.spec.grid
    return GpuWeight(
        words_BOS=words.permute(1, 0, 2).contiguous(),
        scale_GO=_stored_scale(q, (torch.bfloat16, torch.float16, torch.float32)).T.contiguous(),
        zero_GO=None if q.zero_point_RG is None else q.zero_point_RG.T.to(torch.int16).contiguous(),
        locks=torch.zeros(LOCKS, dtype=torch.int32, device=full.device),
        bias_O=q.bias_O,
        order_I=order_I,
        shape=q.shape,
        group_size=_group_size(q),
        middle=-grid.lowest if isinstance(grid, IntGrid) else None,
        factor=1.0 if q.global_scale is None else float(q.global_scale),
        bits=bits,
    )


def unpack_gpu(w: GpuWeight) -> Tensor:
    """The weight of a GpuWeight: float32 (O, I), columns as stored."""
    shifts = torch.arange(0, 16, w.bits, dtype=torch.int32, device=w.words_BOS.device)[:, None]
    words = w.words_BOS.permute(1, 0, 2).to(torch.int32)
    codes = (words.unsqueeze(2) >> shifts) & ((1 << w.bits) - 1)  # O B J S
    codes = codes.reshape(w.shape[0], -1)[:, : w.shape[1]]
    scale = _spread(w.scale_GO.float(), w)
    if w.middle is None:
        return values(E2M1).float().to(codes.device)[codes] * scale * w.factor
    zero = w.middle if w.zero_GO is None else _spread(w.zero_GO, w)
    return (codes - zero) * scale * w.factor


def _spread(value_GO: Tensor, w: GpuWeight) -> Tensor:
    return value_GO.T.repeat_interleave(w.group_size, dim=1)


def _stored_bits(q: QuantizedLinear) -> int:
    return 4 if q.spec.grid.bits <= 4 else 8


def split_terms(x: Tensor) -> Tensor:
    """x as a sum of bfloat16 tensors: (1, ...) for bfloat16, (2, ...) for float16, else (3, ...).

    Exact: a float16 has 11 significant bits and a float32 24, a bfloat16 has 8.
    """
    if x.dtype == torch.bfloat16:
        return x.unsqueeze(0)
    terms, rest = [], x.float()
    for _ in range(2 if x.dtype == torch.float16 else 3):
        terms.append(rest.to(torch.bfloat16))
        rest = rest - terms[-1].float()
    return torch.stack(terms)


def _ordered(q: QuantizedLinear) -> tuple[Tensor, Tensor | None]:
    if q.group_of_column_I is None:
        return q.codes_OI, None
    order = torch.argsort(q.group_of_column_I, stable=True)
    return q.codes_OI[:, order], order


def _group_size(q: QuantizedLinear) -> int:
    return q.shape[1] // q.scale_RG.shape[1]


def _table(q: QuantizedLinear) -> Tensor:
    known = values(q.spec.grid)
    return known[torch.arange(16) % len(known)].to(torch.bfloat16)


def _stored_scale(q: QuantizedLinear, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The scales in a dtype the kernels know, without loss; E4M3 and E8M0 fit bfloat16."""
    if q.spec.scale in (E4M3, E8M0):
        return q.scale_RG.to(torch.bfloat16)
    return q.scale_RG if q.scale_RG.dtype in dtypes else q.scale_RG.float()


def _tiled(value_OG: Tensor, tiles: int) -> Tensor:
    full = pad(value_OG, (0, 0, 0, tiles * LANES - value_OG.shape[0]), value=1)
    return full.reshape(tiles, LANES, -1).transpose(1, 2).contiguous()
