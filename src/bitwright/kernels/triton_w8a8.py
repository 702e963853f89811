"""W8A8 in Triton: INT8 or FP8 E4M3 codes of inputs times codes of weights.

Two kernels. `quantize_tokens` reads a row of 16-bit inputs, finds its largest magnitude (of the
row, or of every 128 columns), and writes codes and float32 scales, in one launch. `w8a8` multiplies
codes on the tensor cores, INT8 into int32 sums, FP8 into float32 sums, and applies both scales and
the bias before anything is written: sums never reach memory. With scales per 128 columns and
128 x 128 weight blocks (DeepSeek's FP8), every block's sum is scaled as it is added.

Products of codes are exact; INT8 sums too. FP8 needs sm_89. Imported only where Triton is; with
TRITON_INTERPRET=1 the same code runs on CPU tensors (codes widened to float32 there).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.layouts import BLOCK, EightBitWeight
from bitwright.kernels.tiles import Tile, tile_for

RANGE = {torch.int8: (-128.0, 127.0), torch.float8_e4m3fn: (-448.0, 448.0)}


# By the number of rows: the first entry whose limit holds. Not measured yet.
TILES = ((16, Tile(16, 64, 4, 4)), (64, Tile(64, 64, 4, 4)), (1 << 30, Tile(128, 128, 8, 3)))


def quantize_tokens(
    x_MI: Tensor, dtype: torch.dtype, *, blocks: bool = False, static: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(codes (M, I) of ``dtype``, float32 scales (M, 1) or (M, ceil(I/128))) of 16-bit inputs.

    The scale is max|x| / 127 or / 448, or ``static``, float32 (1,), for all; codes are the nearest
    ones, ties to even.
    """
    x_MI = x_MI.contiguous()
    rows, cols = x_MI.shape
    codes = torch.empty(rows, cols, dtype=dtype, device=x_MI.device)
    width = BLOCK if blocks else 1024
    parts = triton.cdiv(cols, width)
    scales = (rows, parts if blocks else 1)
    scale = torch.empty(scales, dtype=torch.float32, device=x_MI.device)
    if rows:
        _quantize[(rows,)](
            x_MI, codes, scale, static, cols, *RANGE[dtype], WIDTH=width, BLOCKS=parts,
            PER_BLOCK=blocks, STATIC=static is not None, INTEGER=dtype == torch.int8,
        )  # fmt: skip
    return codes, scale


def w8a8(x_MI: Tensor, w: EightBitWeight) -> Tensor:
    """x Wᵀ + bias of inputs rounded here: (M, I) -> (M, O) in ``x_MI``'s dtype. Never waits."""
    codes, scale = quantize_tokens(
        x_MI, w.codes_OI.dtype, blocks=w.scale.ndim == 2, static=w.input_scale
    )
    return product(codes, scale, w, x_MI.dtype)


def product(codes_MI: Tensor, scale: Tensor, w: EightBitWeight, dtype: torch.dtype) -> Tensor:
    """codes * scale times the weight, plus bias, (M, O) in ``dtype``."""
    (rows, cols), channels = codes_MI.shape, len(w.codes_OI)
    tile = tile_for(rows, TILES)
    out = torch.empty(rows, channels, dtype=dtype, device=codes_MI.device)
    if not rows:
        return out
    _product[(triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.channels))](
        codes_MI, w.codes_OI, scale, w.scale, w.bias_O, out, rows, channels, cols,
        ROWS=tile.rows, CHANNELS=tile.channels, STEP=BLOCK, BLOCKS=triton.cdiv(cols, BLOCK),
        PER_BLOCK=w.scale.ndim == 2, INTEGER=codes_MI.dtype == torch.int8,
        HAS_BIAS=w.bias_O is not None,
        WIDE=codes_MI.device.type == "cpu", num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(  # type: ignore[no-untyped-def]
    x_ptr, codes_ptr, scale_ptr, static_ptr, cols, smallest, largest,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, STATIC: tl.constexpr,
    INTEGER: tl.constexpr,
):  # fmt: skip
    """One row. The second reading of it comes from the cache."""
    row = tl.program_id(0)
    step = tl.arange(0, WIDTH)
    amax = tl.full((), 0.0, tl.float32)
    if STATIC:
        amax = tl.load(static_ptr)
        tl.store(scale_ptr + row, amax)
    elif not PER_BLOCK:
        for block in range(BLOCKS):
            column = block * WIDTH + step
            x = tl.load(x_ptr + row * cols + column, mask=column < cols, other=0).to(tl.float32)
            amax = tl.maximum(amax, tl.max(tl.abs(x), 0))
        amax = tl.where(amax > 0, amax / largest, 1.0)
        tl.store(scale_ptr + row, amax)
    for block in range(BLOCKS):
        column = block * WIDTH + step
        x = tl.load(x_ptr + row * cols + column, mask=column < cols, other=0).to(tl.float32)
        scale = amax
        if PER_BLOCK:
            scale = tl.max(tl.abs(x), 0)
            scale = tl.where(scale > 0, scale / largest, 1.0)
            tl.store(scale_ptr + row * BLOCKS + block, scale)
        value = tl.minimum(tl.maximum(x / scale, smallest), largest)
        if INTEGER:
            # adding 1.5 * 2^23 leaves no bits for a fraction: nearest, ties to even
            code = ((value + 12582912.0) - 12582912.0).to(tl.int8)
        else:
            # to three bits of fraction, below 2^-6 to multiples of 2^-9; then converting is exact
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
            small = (value + 24576.0) - 24576.0
            rounded = tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))
            code = rounded.to(tl.float8e4nv)
        tl.store(codes_ptr + row * cols + column, code, mask=column < cols)


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr, rows, channels, cols,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
    PER_BLOCK: tl.constexpr, INTEGER: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the output; STEP columns at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    step = tl.arange(0, STEP)
    whole = tl.zeros((ROWS, CHANNELS), dtype=tl.int32)
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    for block in range(BLOCKS):
        column = block * STEP + step
        inside = column[None, :] < cols
        x = tl.load(
            x_ptr + row[:, None] * cols + column[None, :],
            mask=(row[:, None] < rows) & inside, other=0.0,
        )  # fmt: skip
        w = tl.load(
            w_ptr + channel[:, None] * cols + column[None, :],
            mask=(channel[:, None] < channels) & inside, other=0.0,
        )  # fmt: skip
        if WIDE:
            sums = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)))
            if INTEGER:
                whole += sums.to(tl.int32)
        elif INTEGER:
            whole = tl.dot(x, tl.trans(w), whole, out_dtype=tl.int32)
        else:
            sums = tl.dot(x, tl.trans(w))
        if not INTEGER:
            if PER_BLOCK:
                x_scale = tl.load(x_scale_ptr + row * BLOCKS + block, mask=row < rows, other=0)
                w_scale = tl.load(
                    w_scale_ptr + (channel // 128) * BLOCKS + block,
                    mask=channel < channels, other=0,
                )  # fmt: skip
                sums *= x_scale[:, None] * w_scale[None, :]
            total += sums
    if INTEGER:
        total = whole.to(tl.float32)
    if not PER_BLOCK:
        x_scale = tl.load(x_scale_ptr + row, mask=row < rows, other=0)
        w_scale = tl.load(w_scale_ptr + channel, mask=channel < channels, other=0)
        total = total * x_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0)
        total += bias[None, :]
    tl.store(
        out_ptr + row[:, None] * channels + channel[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(row[:, None] < rows) & (channel[None, :] < channels),
    )
