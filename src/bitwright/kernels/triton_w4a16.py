"""Low-bit weights times 16-bit inputs in Triton: INT4, INT8, and E2M1 (NVFP4, MXFP4).

Weights come in the order of `layouts.GpuWeight`. A program owns CHANNELS outputs of ROWS tokens and
a share of the blocks of columns. It computes the transposed product W xᵀ, so that the weight is the
left operand of the tensor cores, which may stay in registers (mma on sm_80, wgmma on sm_90): a tile
of words is copied to shared memory asynchronously, read once in operand order, and each of its
codes becomes a 16-bit number by a shift, a mask-or and a subtraction, with nothing moved between
threads. Numbers are exact (the zero point is subtracted, the scale is not applied), so only sums
round; a group's float32 sum is scaled once.

Programs that share an output put their sums into a buffer; the last to finish, found by a counter,
adds them up in the order of the columns: one launch, and the same bits every time. Counters are
zero again when a launch ends, so nothing is cleared and CUDA graphs can replay it.

Imported only where Triton is (`pip install 'bitwright[triton]'`); with TRITON_INTERPRET=1 the same
code runs on CPU tensors. docs/kernels.md shows what it compiles to.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitwright.kernels.layouts import GpuWeight
from bitwright.kernels.tiles import Tile, tile_for

EXPANDED_FROM = 1024  # rows; beyond, the weight is dequantized once and multiplied as 16 bits


# By the number of rows: the first entry whose limit holds. Not measured yet.
TILES = (
    (16, Tile(16, 128, 4, 4)),
    (32, Tile(32, 128, 4, 4)),
    (64, Tile(64, 128, 8, 3)),
    (1 << 30, Tile(128, 128, 8, 3)),
)


def w4a16(x_MI: Tensor, w: GpuWeight) -> Tensor:
    """x Wᵀ + bias, (M, I) -> (M, O) in ``x_MI``'s dtype, on the device of ``w``.

    Of float32 inputs and of many rows it is the ordinary product with the weight dequantized.
    Launches on the current stream and never waits for it; two launches that use one weight must
    not run at the same time (its counters are shared).
    """
    if w.order_I is not None:
        x_MI = x_MI[:, w.order_I]
    x_MI = x_MI.contiguous()
    rows, (channels, cols) = len(x_MI), w.shape
    if rows >= EXPANDED_FROM or x_MI.dtype not in (torch.float16, torch.bfloat16):
        bias = None if w.bias_O is None else w.bias_O.to(x_MI.dtype)
        return torch.nn.functional.linear(x_MI, expanded(w, x_MI.dtype), bias)
    out = torch.empty(rows, channels, dtype=x_MI.dtype, device=x_MI.device)
    if not rows:
        return out
    tile = tile_for(min(rows, largest_tile(w.group_size, _capability(x_MI.device))), TILES)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(channels, tile.channels))
    share = share_of(grid[0] * grid[1], w, _multiprocessors(x_MI.device))
    split = triton.cdiv(len(w.words_BOS), share)
    parts = torch.empty(
        split if split > 1 else 0, rows, channels, dtype=torch.float32, device=x_MI.device
    )
    _product[(*grid, split)](
        x_MI, w.words_BOS, w.scale_GO, w.zero_GO, w.bias_O, out, parts, w.locks, rows, channels,
        cols, w.factor, **constants(w, x_MI.dtype, share, tile), PTX=_speaks_ptx(x_MI.device),
        WIDE=x_MI.device.type == "cpu",  # the interpreter knows no bfloat16 arithmetic
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def constants(w: GpuWeight, dtype: torch.dtype, share: int, tile: Tile) -> dict[str, int | bool]:
    """What a variant of the product is compiled for, ``share`` blocks of columns per program."""
    block, blocks = w.block, len(w.words_BOS)
    small = w.group_size < block and w.group_size != w.shape[1]
    return {
        "SHARE": share,
        "SPLIT": triton.cdiv(blocks, share),
        "BITS": w.bits,
        "WIDTH": min(32, w.group_size) if small else 32,
        "GROUP": w.group_size if small else block,
        "BLOCKS_PER_GROUP": 0 if w.group_size == w.shape[1] else max(1, w.group_size // block),
        "MIDDLE": w.middle or 0,
        "HAS_ZERO": w.zero_GO is not None,
        "FLOAT": w.middle is None,
        "HAS_BIAS": w.bias_O is not None,
        "EVEN": w.shape[1] % block == 0 and blocks % share == 0,
        "HALF": dtype == torch.float16,
        "ROWS": tile.rows,
        "CHANNELS": tile.channels,
    }


def expanded(w: GpuWeight, dtype: torch.dtype) -> Tensor:
    """The weight dequantized, (O, I) in ``dtype``, columns as stored."""
    channels, cols = w.shape
    out = torch.empty(channels, cols, dtype=dtype, device=w.words_BOS.device)
    step = 32
    _expand[(triton.cdiv(channels, step), len(w.words_BOS))](
        w.words_BOS, w.scale_GO, w.zero_GO, out, channels, cols, w.group_size, w.factor,
        BITS=w.bits, MIDDLE=w.middle or 0, CHANNELS=step, HAS_ZERO=w.zero_GO is not None,
        FLOAT=w.middle is None,
    )  # fmt: skip
    return out


def largest_tile(group_size: int, capability: tuple[int, int]) -> int:
    """Rows of the largest tile that needs no more registers (sm_100: tensor memory) than exist."""
    rows = 64 if group_size < 64 else 128
    return rows // 2 if capability >= (10, 0) else rows


def share_of(tiles: int, w: GpuWeight, multiprocessors: int) -> int:
    """How many blocks of columns one program does: all, or so few that two programs per
    multiprocessor exist, but four."""
    blocks = len(w.words_BOS)
    if tiles > len(w.locks):
        return blocks
    split = max(1, min(-(-2 * multiprocessors // tiles), blocks // 4))
    return -(-blocks // split)


def _speaks_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if _speaks_ptx(device) else (0, 0)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.constexpr_function
def assembly(place, half, real):  # type: ignore[no-untyped-def]
    """PTX for two codes in one register, at bits 4 place and 16 + 4 place: $0 = their values.

    Integers: or-ed into 1024 (float16) or 128 (bfloat16), plus $2, which takes that away. E2M1:
    sign, exponent and mantissa put in their places, which is 2^-14 (2^-126) times the value.
    """
    if not real:
        magic = "0x64006400" if half else "0x43004300"
        add = (
            "add.rn.f16x2 $0, t, $2;" if half
            else "mov.b32 u, 0x3F803F80; fma.rn.bf16x2 $0, t, u, $2;"
        )  # fmt: skip
        return (
            f"{{ .reg .b32 t, u; shr.u32 t, $1, {4 * place}; "
            f"lop3.b32 t, t, 0x000F000F, {magic}, 0xEA; {add} }}"
        )
    up = 9 if half else 6
    sign = f"shl.b32 u, $1, {12 - 4 * place};"
    move = up - 4 * place
    size = f"shl.b32 t, $1, {move};" if move >= 0 else f"shr.u32 t, $1, {-move};"
    mask = "0x0E000E00" if half else "0x01C001C0"
    join = f"lop3.b32 t, t, {mask}, u, 0xEA;"
    finish = "mov.b32 $0, t;" if half else "mov.b32 u, 0x80008000; fma.rn.bf16x2 $0, t, $2, u;"
    return f"{{ .reg .b32 t, u; {sign} and.b32 u, u, 0x80008000; {size} {join} {finish} }}"


@triton.jit  # type: ignore[untyped-decorator]
def _value(  # type: ignore[no-untyped-def]
    word, zero, PLACE: tl.constexpr, BITS: tl.constexpr, FLOAT: tl.constexpr, HALF: tl.constexpr,
    PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Code number PLACE of every word as a 16-bit float minus its zero point; of E2M1 codes the
    value times 2^-14 in float16, and itself in bfloat16."""
    to = tl.float16 if HALF else tl.bfloat16
    if PTX and BITS == 4:
        if FLOAT:
            other = tl.full(word.shape, 0.0 if HALF else 8.507059173023462e37, to)  # 2^126
        else:
            other = (-zero - (1024 if HALF else 128)).to(to)
        value = tl.inline_asm_elementwise(
            assembly(PLACE, HALF, FLOAT), "=r,r,r", [word, other], to, is_pure=True, pack=2
        )
    else:
        code = (word >> (BITS * PLACE)) & ((1 << BITS) - 1)
        if FLOAT:
            bits = ((code & 8) << 12) | ((code & 7) << 9)
            value = bits.to(tl.float16, bitcast=True)
            if not HALF:
                value = (value.to(tl.float32) * 16384.0).to(to)
        elif HALF:
            value = (code | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024).to(to)
        elif BITS == 4 and not WIDE:
            value = (code | 0x4300).to(to, bitcast=True) - (zero + 128).to(to)
        else:
            wide = (code.to(tl.int32) | 0x4B400000).to(tl.float32, bitcast=True)
            value = (wide - (zero + 12582912).to(tl.float32)).to(to)
    return value.to(tl.float32) if WIDE else value


@triton.jit  # type: ignore[untyped-decorator]
def _zero(  # type: ignore[no-untyped-def]
    zero_ptr, where, MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr
):  # fmt: skip
    """What is subtracted from the codes of a group, int32 (CHANNELS, 1)."""
    if HAS_ZERO:
        zero = tl.load(zero_ptr + where).to(tl.int32)
    else:
        zero = tl.full(where.shape, MIDDLE, tl.int32)
    return zero[:, None]


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x_ptr, words_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, parts_ptr, locks_ptr,
    rows, channels, cols, factor,
    SHARE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    BITS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCKS_PER_GROUP: tl.constexpr,
    MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr, FLOAT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, HALF: tl.constexpr, PTX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of the output, of one share of the columns. WIDTH columns make one dot product;
    GROUP: columns that share a scale within a block."""
    BLOCK: tl.constexpr = 512 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    # beyond the edges the last row and channel are read again, and never stored
    read_row = tl.minimum(row, rows - 1)
    read_channel = tl.minimum(channel, channels - 1)
    step = tl.arange(0, WIDTH)
    total = tl.zeros((CHANNELS, ROWS), dtype=tl.float32)
    sums = tl.zeros((CHANNELS, ROWS), dtype=tl.float32)
    for turn in range(SHARE):
        block = tl.program_id(2) * SHARE + turn
        # past the last column a block is read again, times inputs that are zero
        read_block = block if EVEN else tl.minimum(block, (cols - 1) // BLOCK)
        for part in tl.static_range(32 // WIDTH):
            at = (read_block * channels + read_channel[:, None]) * 32 + part * WIDTH + step[None, :]
            word = tl.load(words_ptr + at, eviction_policy="evict_first")
            for place in tl.static_range(16 // BITS):
                column = block * BLOCK + place * 32 + part * WIDTH
                if BLOCKS_PER_GROUP == 0:
                    where = read_channel
                elif GROUP == BLOCK:
                    where = (read_block // BLOCKS_PER_GROUP) * channels + read_channel
                else:
                    group = (column if EVEN else tl.minimum(column, cols - 1)) // GROUP
                    where = group * channels + read_channel
                x_at = read_row[:, None] * cols + column + step[None, :]
                if EVEN:
                    x = tl.load(x_ptr + x_at)
                else:
                    x = tl.load(x_ptr + x_at, mask=(column + step)[None, :] < cols, other=0)
                # read before the dot product, so that it does not wait for memory after it
                scale = tl.load(scale_ptr + where).to(tl.float32)
                zero = _zero(zero_ptr, where, MIDDLE, HAS_ZERO)
                value = _value(word, zero, place, BITS, FLOAT, HALF, PTX, WIDE)
                if WIDE:
                    x = x.to(tl.float32)
                if GROUP <= WIDTH or ((place * 32) % GROUP == 0 and BLOCKS_PER_GROUP > 0):
                    sums = tl.dot(value, tl.trans(x))
                else:
                    sums = tl.dot(value, tl.trans(x), sums)
                if GROUP <= WIDTH or ((place * 32 + 32) % GROUP == 0 and BLOCKS_PER_GROUP > 0):
                    total += sums * scale[:, None]
    if BLOCKS_PER_GROUP == 0:
        total = sums * tl.load(scale_ptr + read_channel).to(tl.float32)[:, None]
    inside = (channel[:, None] < channels) & (row[None, :] < rows)
    place_of = row[None, :] * channels + channel[:, None]
    last = True
    if SPLIT > 1:
        tl.store(parts_ptr + tl.program_id(2) * rows * channels + place_of, total, mask=inside)
        tl.debug_barrier()  # every thread's sums are written before the counter says so
        lock = locks_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        last = tl.atomic_add(lock, 1, sem="acq_rel") == SPLIT - 1
        if last:
            total = tl.zeros((CHANNELS, ROWS), dtype=tl.float32)
            for share_ in range(SPLIT):
                there = parts_ptr + share_ * rows * channels + place_of
                total += tl.load(there, mask=inside, other=0, cache_modifier=".cg")
            tl.store(lock, 0)
    if last:
        if FLOAT and HALF:
            total *= 16384.0
        total *= factor
        if HAS_BIAS:
            total += tl.load(bias_ptr + read_channel).to(tl.float32)[:, None]
        tl.store(out_ptr + place_of, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _expand(  # type: ignore[no-untyped-def]
    words_ptr, scale_ptr, zero_ptr, out_ptr, channels, cols, group_size, factor,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, CHANNELS: tl.constexpr, HAS_ZERO: tl.constexpr,
    FLOAT: tl.constexpr,
):  # fmt: skip
    """One block of columns of some channels, dequantized."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    block, step = tl.program_id(1), tl.arange(0, 32)
    at = (block * channels + channel[:, None]) * 32 + step[None, :]
    word = tl.load(words_ptr + at, mask=channel[:, None] < channels, other=0)
    for place in tl.static_range(16 // BITS):
        column = block * (512 // BITS) + place * 32 + step
        mask = (channel[:, None] < channels) & (column[None, :] < cols)
        where = (column // group_size)[None, :] * channels + channel[:, None]
        scale = tl.load(scale_ptr + where, mask=mask, other=0).to(tl.float32)
        code = (word >> (BITS * place)) & ((1 << BITS) - 1)
        if FLOAT:
            bits = ((code & 8) << 12) | ((code & 7) << 9)
            value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        elif HAS_ZERO:
            zero = tl.load(zero_ptr + where, mask=mask, other=0).to(tl.int32)
            value = (code.to(tl.int32) - zero).to(tl.float32)
        else:
            value = (code.to(tl.int32) - MIDDLE).to(tl.float32)
        value = value * scale * factor
        to = channel[:, None] * cols + column[None, :]
        tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=mask)
