"""W4A16 in Triton: 4-bit integer or E2M1 (NVFP4, MXFP4) weights times 16-bit inputs.

Weights come in the order of `layouts.GpuWeight`. A program owns BM rows by BN channels and a share
of the blocks of 128 columns (split-K, so that skinny products use every multiprocessor). Per block
it loads one contiguous tile of words and, for each of the eight nibbles, turns the tile into 16-bit
numbers in registers and multiplies: or-ing a code into the mantissa of 1024 (float16) or 2^23
(float32, then cut to bfloat16) makes a number whose excess is subtracted with the zero point.
Codes minus zero points are exact in 16 bits, so only sums round; a group's sum is scaled once.
E2M1 codes are moved to the top bits of a float16, whose value is then theirs times 2^-14.

Imported only where Triton is (`pip install 'bitwright[triton]'`); with TRITON_INTERPRET=1 the same
code runs on CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.layouts import BLOCK, GpuWeight
from bitwright.kernels.tiles import Tile, tile_for

EXPANDED_FROM = 256  # rows; beyond, the weight is dequantized once and multiplied as 16 bits


# By the number of rows: the first entry whose limit holds. Not measured yet.
TILES = (
    (16, Tile(16, 64, 4, 4)),
    (32, Tile(32, 64, 4, 4)),
    (64, Tile(64, 64, 4, 3)),
    (1 << 30, Tile(64, 128, 8, 3)),
)


def w4a16(x_MI: Tensor, w: GpuWeight) -> Tensor:
    """x Wᵀ + bias, (M, I) -> (M, O), float16 or bfloat16, on the device of ``w``."""
    if w.order_I is not None:
        x_MI = x_MI[:, w.order_I]
    x_MI = x_MI.contiguous()
    if len(x_MI) >= EXPANDED_FROM:
        bias = None if w.bias_O is None else w.bias_O.to(x_MI.dtype)
        return torch.nn.functional.linear(x_MI, expanded(w, x_MI.dtype), bias)
    rows, channels = len(x_MI), w.shape[0]
    tile = tile_for(rows, TILES)
    grid = (triton.cdiv(channels, tile.channels), triton.cdiv(rows, tile.rows))
    blocks = len(w.words_BOS)
    split = split_of(grid[0] * grid[1], blocks, _multiprocessors(x_MI.device))
    parts = torch.empty(split, rows, channels, dtype=torch.float32, device=x_MI.device)
    _product[(*grid, split)](
        x_MI, w.words_BOS, w.scale_GO, w.zero_GO, parts, rows, channels, w.shape[1], blocks,
        max(1, triton.cdiv(w.group_size, BLOCK)), w.middle or 0,
        SHARE=triton.cdiv(blocks, split), ROWS=tile.rows, CHANNELS=tile.channels,
        SLICES=w.group_size // 16 if w.group_size in (16, 32, 64) else 8,
        HAS_ZERO=w.zero_GO is not None, FLOAT=w.middle is None, HALF=x_MI.dtype == torch.float16,
        WIDE=x_MI.device.type == "cpu",  # the interpreter cannot multiply bfloat16
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    out = parts.sum(0) if split > 1 else parts[0]
    if w.factor != 1.0:
        out = out * w.factor
    if w.bias_O is not None:
        out = out + w.bias_O.float()
    return out.to(x_MI.dtype)


def expanded(w: GpuWeight, dtype: torch.dtype) -> Tensor:
    """The weight dequantized, (O, I) in ``dtype``, columns as stored."""
    channels, cols = w.shape
    out = torch.empty(channels, cols, dtype=dtype, device=w.words_BOS.device)
    step = 32
    _expand[(triton.cdiv(channels, step), len(w.words_BOS))](
        w.words_BOS, w.scale_GO, w.zero_GO, out, channels, cols, w.group_size, w.middle or 0,
        w.factor, CHANNELS=step, HAS_ZERO=w.zero_GO is not None, FLOAT=w.middle is None,
    )  # fmt: skip
    return out


def split_of(programs: int, blocks: int, multiprocessors: int) -> int:
    """Over how many programs the columns are split: enough to fill the device, four blocks each."""
    wanted = -(-2 * multiprocessors // programs)
    return max(1, min(wanted, blocks // 4))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _e2m1(code):  # type: ignore[no-untyped-def]
    """The float16 value of 4-bit floats; subnormal ones are exact too."""
    bits = ((code & 8) << 12) | ((code & 7) << 9)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scale_ptr, zero_ptr, parts_ptr, rows, channels, cols, blocks,
    blocks_per_group, middle,
    SHARE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, SLICES: tl.constexpr,
    HAS_ZERO: tl.constexpr, FLOAT: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of one part; SLICES: steps of 16 columns that share a scale within a block."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.arange(0, 16)
    first = tl.program_id(2) * SHARE
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for turn in range(SHARE):
        block = first + turn
        at = (block * channels + channel[:, None]) * 16 + step[None, :]
        word = tl.load(
            words_ptr + at, mask=(channel[:, None] < channels) & (block < blocks), other=0
        )
        for part in tl.static_range(8 // SLICES):
            group = block // blocks_per_group if SLICES == 8 else block * (8 // SLICES) + part
            where = group * channels + channel
            # a group past the last column has no scale, and only zero inputs
            stored = (channel < channels) & (block * 128 + part * SLICES * 16 < cols)
            scale = tl.load(scale_ptr + where, mask=stored, other=0).to(tl.float32)
            zero = tl.full((CHANNELS,), 0, dtype=tl.int32) + middle
            if HAS_ZERO:
                zero = tl.load(zero_ptr + where, mask=stored, other=0)
            sums = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
            for inner in tl.static_range(SLICES):
                slice_ = part * SLICES + inner
                column = block * 128 + slice_ * 16 + step
                mask = (row[:, None] < rows) & (column[None, :] < cols)
                x = tl.load(x_ptr + row[:, None] * cols + column[None, :], mask=mask, other=0)
                code = (word >> (4 * slice_)) & 15
                if FLOAT:
                    value = _e2m1(code)
                    if not HALF:
                        value = value.to(tl.float32).to(tl.bfloat16)
                elif HALF:
                    value = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
                    value = value - (zero + 1024).to(tl.float16)[:, None]
                else:
                    wide = (code | 0x4B000000).to(tl.float32, bitcast=True)
                    value = (wide - (zero + 8388608).to(tl.float32)[:, None]).to(tl.bfloat16)
                if WIDE:
                    sums = tl.dot(x.to(tl.float32), tl.trans(value.to(tl.float32)), sums)
                else:
                    sums = tl.dot(x, tl.trans(value), sums)
            total += sums * scale[None, :]
    out = (tl.program_id(2) * rows + row[:, None]) * channels + channel[None, :]
    tl.store(parts_ptr + out, total, mask=(row[:, None] < rows) & (channel[None, :] < channels))


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    words_ptr, scale_ptr, zero_ptr, out_ptr, channels, cols, group_size, middle, factor,
    CHANNELS: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """One block of 128 columns of some channels, dequantized."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    block, step = tl.program_id(1), tl.arange(0, 16)
    at = (block * channels + channel[:, None]) * 16 + step[None, :]
    word = tl.load(words_ptr + at, mask=channel[:, None] < channels, other=0)
    for slice_ in tl.static_range(8):
        column = block * 128 + slice_ * 16 + step
        mask = (channel[:, None] < channels) & (column[None, :] < cols)
        where = (column // group_size)[None, :] * channels + channel[:, None]
        scale = tl.load(scale_ptr + where, mask=mask, other=0).to(tl.float32)
        zero = tl.full((CHANNELS, 16), 0, dtype=tl.int32) + middle
        if HAS_ZERO:
            zero = tl.load(zero_ptr + where, mask=mask, other=0)
        code = (word >> (4 * slice_)) & 15
        if FLOAT:
            value = _e2m1(code).to(tl.float32) * scale * factor
        else:
            value = (code - zero).to(tl.float32) * scale * factor
        to = channel[:, None] * cols + column[None, :]
        tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=mask)
