"""The bytes of GGUF's super-blocks of 256 weights.

| type | bytes | layout                                                                      |
|------|-------|-----------------------------------------------------------------------------|
| Q4_K | 144   | d, dmin float16; 12 bytes of 6-bit factors; 128 of nibbles                  |
| Q5_K | 176   | d, dmin; 12; 32 bytes of fifth bits; 128 of nibbles                         |
| Q6_K | 210   | 128 bytes of nibbles; 64 of upper bit pairs; 16 int8 factors; d float16     |

Sub-blocks of Q4_K and Q5_K: byte p of the nibbles' 32-byte part c holds weight p of sub-block 2c
below that of sub-block 2c + 1; bit s of fifth-bit byte p belongs to weight p of sub-block s.
Q6_K is two halves of 128: byte p of a half's 64 nibble bytes holds weight p below weight p + 64,
bits 2s and 2s + 1 of byte p of its 32 upper bytes belong to weight 32s + p.
"""

import torch
from torch import Tensor


def pack_factors(scale_S8: Tensor, offset_S8: Tensor) -> Tensor:
    """Two times eight 6-bit integers -> uint8 (S, 12)."""
    scale, offset = scale_S8.to(torch.uint8), offset_S8.to(torch.uint8)
    upper = scale[:, :4] | scale[:, 4:] >> 4 << 6
    middle = offset[:, :4] | offset[:, 4:] >> 4 << 6
    lower = (scale[:, 4:] & 15) | (offset[:, 4:] & 15) << 4
    return torch.cat([upper, middle, lower], 1)


def unpack_factors(data: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_factors`: two uint8 (S, 8)."""
    upper, middle, lower = data[:, :4], data[:, 4:8], data[:, 8:]
    scale = torch.cat([upper & 63, lower & 15 | upper >> 6 << 4], 1)
    offset = torch.cat([middle & 63, lower >> 4 | middle >> 6 << 4], 1)
    return scale, offset


def pack_pairs(codes: Tensor) -> Tensor:
    """4-bit codes (S, 256) -> (S, 128), sub-blocks of 32 in pairs."""
    pairs = codes.view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def unpack_pairs(data: Tensor) -> Tensor:
    """Inverse of `pack_pairs`."""
    part = data.reshape(-1, 4, 1, 32)
    return torch.cat([part & 15, part >> 4], 2).reshape(-1, 256)


def pack_fifth_bits(codes: Tensor) -> Tensor:
    """5-bit codes (S, 256) -> (S, 32): the bits above the nibbles."""
    bits = codes.view(-1, 8, 32) >> 4 & 1
    return (bits << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1).to(torch.uint8)


def unpack_fifth_bits(data: Tensor) -> Tensor:
    """Inverse of `pack_fifth_bits`: (S, 256) of 0 and 16."""
    bits = data[:, None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return (bits << 4).reshape(-1, 256)


def pack_six(codes: Tensor) -> tuple[Tensor, Tensor]:
    """6-bit codes (S, 256) -> nibbles (S, 128), upper bit pairs (S, 64)."""
    halves = codes.view(-1, 2, 2, 64) & 15
    lower = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(-1, 128)
    pairs = codes.view(-1, 2, 4, 32) >> 4
    shift = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    return lower, (pairs << shift).sum(2).to(torch.uint8).reshape(-1, 64)


def unpack_six(lower: Tensor, upper: Tensor) -> Tensor:
    """Inverse of `pack_six`."""
    part = lower.reshape(-1, 2, 1, 64)
    nibbles = torch.cat([part & 15, part >> 4], 2).reshape(-1, 256)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    pairs = upper.reshape(-1, 2, 1, 32) >> shift & 3
    return nibbles | (pairs << 4).reshape(-1, 256)
