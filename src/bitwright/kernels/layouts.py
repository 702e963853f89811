"""A QuantizedLinear's codes, reordered into what the kernels load: pure functions over tensors.

Both layouts keep 4 bits per weight, whatever format the checkpoint had, and any grid of at most
16 values: the kernels look a code's value up in ``table`` (integers, E2M1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitwright.numerics.grids import E2M1, E4M3, E8M0, IntGrid, values
from bitwright.schemes.quantized import QuantizedLinear

LANES = 64  # output channels of one CPU tile: four vectors of 16
BLOCK = 128  # input columns of one GPU block: eight steps of 16
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
    """4-bit integer weights in the order the Triton kernel loads them.

    ``words_BOS``: int32 (blocks of 128 columns, O, 16). Nibble j of word s of block b holds input
    column 128 b + 16 j + s: shifting a tile of words by 4 j gives 16 neighbouring columns, a whole
    step of a tensor core's product, without moving anything between threads. A tile of a block's
    channels is one contiguous piece of memory. Columns are padded to 128 with code 0.
    ``scale_GO``: (G, O), 16 bits or float32, neighbours are channels; ``zero_GO``: int32 or None,
    ``middle`` is subtracted where it is None; ``middle`` is None for E2M1 codes. ``factor``: the
    scale of the whole tensor.
    """

    words_BOS: Tensor
    scale_GO: Tensor
    zero_GO: Tensor | None
    middle: int | None
    bias_O: Tensor | None
    order_I: Tensor | None
    shape: tuple[int, int]
    group_size: int
    factor: float = 1.0


def why_not_packed(q: QuantizedLinear) -> str:
    """Why no 4-bit kernel can hold this layer; "" if one can."""
    spec = q.spec
    if spec.grid.bits > 4:
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
    if reason := why_not_packed(q):
        return reason
    if not isinstance(q.spec.grid, IntGrid) and q.spec.grid != E2M1:
        return "its grid is neither integers nor E2M1"
    size = _group_size(q)
    if size not in (16, 32, 64) and size % BLOCK and size != q.shape[1]:
        return f"its group size {size} is not 16, 32, 64, a multiple of {BLOCK} or the whole row"
    return ""


def pack_for_gpu(q: QuantizedLinear) -> GpuWeight:
    """The Triton kernel's storage; `why_not_on_gpu` must be empty."""
    codes_OI, order_I = _ordered(q)
    rows, cols = q.shape
    blocks = -(-cols // BLOCK)
    full = pad(codes_OI, (0, blocks * BLOCK - cols)).to(torch.int32)
    nibbles = full.reshape(rows, blocks, 8, 16)  # O B J S
    zero = torch.zeros((), dtype=torch.int32)
    words = sum((nibbles[:, :, j] << (4 * j) for j in range(8)), zero)
    grid = q.spec.grid
    return GpuWeight(
        words_BOS=words.permute(1, 0, 2).contiguous(),
        scale_GO=_stored_scale(q, (torch.bfloat16, torch.float16, torch.float32)).T.contiguous(),
        zero_GO=None if q.zero_point_RG is None else q.zero_point_RG.T.to(torch.int32).contiguous(),
        middle=-grid.lowest if isinstance(grid, IntGrid) else None,
        bias_O=q.bias_O,
        order_I=order_I,
        shape=q.shape,
        group_size=_group_size(q),
        factor=1.0 if q.global_scale is None else float(q.global_scale),
    )


def unpack_gpu(w: GpuWeight) -> Tensor:
    """The weight of a GpuWeight: float32 (O, I), columns as stored."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=w.words_BOS.device)[:, None]
    codes = (w.words_BOS.permute(1, 0, 2).unsqueeze(2) >> shifts) & 15  # O B J S
    codes = codes.reshape(w.shape[0], -1)[:, : w.shape[1]]
    scale = _spread(w.scale_GO.float(), w)
    if w.middle is None:
        return values(E2M1).float().to(codes.device)[codes] * scale * w.factor
    zero = w.middle if w.zero_GO is None else _spread(w.zero_GO, w)
    return (codes - zero) * scale * w.factor


def _spread(value_GO: Tensor, w: GpuWeight) -> Tensor:
    return value_GO.T.repeat_interleave(w.group_size, dim=1)


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
    full = pad(value_OG, (0, 0, 0, tiles * LANES - value_OG.shape[0]))
    return full.reshape(tiles, LANES, -1).transpose(1, 2).contiguous()
