"""Every bit shuffle lives here.

Dense little-endian packing: 32 codes of b bits fill exactly b int32 words; code i of the 32
occupies bits [i*b, (i+1)*b) of the words seen as one long number, lowest bits first, so 3-,
5-, 6- and 7-bit codes cross word borders. For 2, 4 and 8 bits no code crosses one. This is
the layout of compressed-tensors (>= 0.19) and, along the other axis, of GPTQ's qweight
(whose 3-bit form, 10 + 1 + 10 + 1 + 10 codes in three words, is the same thing).

AWQ packs eight 4-bit codes of neighbouring output rows into a word, even rows first.
"""

import torch
from torch import Tensor

from bitwright.errors import BadShape

PACKED_AT_ONCE = 1 << 22


def pack(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """uint8 codes (A, B) -> int32 words along ``dim``, ceil(side * bits / 32) of them."""
    if dim == 0:
        return pack(codes.T, bits).T.contiguous()
    rows, cols = codes.shape
    if codes.numel() > PACKED_AT_ONCE and rows > 1:  # words on the way take eight times the codes
        few = max(1, PACKED_AT_ONCE // cols)
        return torch.cat([pack(codes[i : i + few], bits) for i in range(0, rows, few)])
    padded = -(-cols // 32) * 32
    full = torch.nn.functional.pad(codes, (0, padded - cols)).to(torch.int64)
    chunk = full.reshape(rows, padded // 32, 32)
    words = torch.zeros(rows, padded // 32, bits, dtype=torch.int64, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= chunk[..., i] << shift
        if shift + bits > 32:
            words[..., word + 1] |= chunk[..., i] >> (32 - shift)
    words = words.reshape(rows, -1)[:, : -(-cols * bits // 32)] & 0xFFFFFFFF
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def unpack(words: Tensor, bits: int, side: int, dim: int = 1) -> Tensor:
    """Inverse of `pack`: int32 words -> uint8 codes, ``side`` of them along ``dim``.

    Raises BadShape for words that are no matrix.
    """
    if words.dim() != 2:
        raise BadShape(f"packed codes have two dimensions, not {list(words.shape)}")
    if dim == 0:
        return unpack(words.T, bits, side).T.contiguous()
    rows = words.shape[0]
    padded = -(-side // 32) * 32
    full = words.to(torch.int64) & 0xFFFFFFFF
    full = torch.nn.functional.pad(full, (0, padded // 32 * bits - words.shape[1]))
    chunk = full.reshape(rows, padded // 32, bits)
    mask = (1 << bits) - 1
    codes = torch.empty(rows, padded // 32, 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = chunk[..., word] >> shift
        if shift + bits > 32:
            value = value | (chunk[..., word + 1] << (32 - shift))
        codes[..., i] = (value & mask).to(torch.uint8)
    return codes.reshape(rows, padded)[:, :side]


def pack_nibbles(codes_OI: Tensor) -> Tensor:
    """4-bit codes (O, I) as bytes (O, I/2), the even column in the low nibble."""
    return codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(1)


_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight neighbours sits in nibble 0, 1, ...
_AWQ_INVERSE = [0, 4, 1, 5, 2, 6, 3, 7]


def pack_awq(codes: Tensor) -> Tensor:
    """uint8 4-bit codes (A, B) -> int32 words (A, ceil(B / 8)), in AWQ's nibble order."""
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % 8))
    return pack(padded.reshape(-1, 8)[:, _AWQ_ORDER].reshape(rows, -1), 4)


def unpack_awq(words: Tensor, side: int) -> Tensor:
    """Inverse of `pack_awq`: int32 words -> uint8 codes, ``side`` of them per row."""
    codes = unpack(words, 4, words.shape[1] * 8)
    ordered = codes.reshape(-1, 8)[:, _AWQ_INVERSE].reshape(len(words), -1)
    return ordered[:, :side]


def pack_halves(codes: Tensor) -> Tensor:
    """uint8 4-bit codes (N, 32) -> (N, 16) bytes: code j below code j + 16, as GGUF does."""
    return codes[:, :16] | codes[:, 16:] << 4


def unpack_halves(data: Tensor) -> Tensor:
    """Inverse of `pack_halves`."""
    return torch.cat([data & 15, data >> 4], 1)
