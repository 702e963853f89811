"""Packing: its own inverse, and the layout of the compressed-tensors package."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from bitwright.formats.packing import pack, unpack


def _codes(shape: tuple[int, int], bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, shape, generator=generator).to(torch.uint8)


SIDES = st.integers(1, 100)


@given(
    bits=st.integers(2, 8),
    rows=SIDES,
    cols=SIDES,
    seed=st.integers(0, 99),
    dim=st.sampled_from([0, 1]),
)
def test_unpack_undoes_pack(bits: int, rows: int, cols: int, seed: int, dim: int) -> None:
    codes = _codes((rows, cols), bits, seed)
    words = pack(codes, bits, dim=dim)
    assert words.dtype is torch.int32
    packed_side = -(-codes.shape[dim] * bits // 32)
    assert words.shape == ((packed_side, cols) if dim == 0 else (rows, packed_side))
    assert torch.equal(unpack(words, bits, codes.shape[dim], dim=dim), codes)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=SIDES,
    cols=SIDES,
    seed=st.integers(0, 99),
    dim=st.sampled_from([0, 1]),
)
def test_words_are_those_of_compressed_tensors(
    bits: int, rows: int, cols: int, seed: int, dim: int
) -> None:
    codes = _codes((rows, cols), bits, seed)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits, dim=dim), pack_to_int32(signed, bits, packed_dim=dim))


def test_lowest_bits_come_first() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x87654321 - (1 << 32)]]
    assert pack(codes[:, :4], 8).tolist() == [[0x04030201]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_inputs_are_not_modified(bits: int) -> None:
    codes = _codes((3, 33), bits, 1)
    before = codes.clone()
    words = pack(codes, bits)
    kept = words.clone()
    unpack(words, bits, 33)
    assert torch.equal(codes, before)
    assert torch.equal(words, kept)
