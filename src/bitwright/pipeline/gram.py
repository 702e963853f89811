"""Xᵀ X of a block's inputs, half of it: the one large product that calibration adds."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitwright.native import function, why_not

_SOURCE = ("bitwright.pipeline", "gram.cpp")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = (_POINTER, _LONG, _LONG, _LONG, _POINTER, ctypes.c_int)
TILE = 256


def add_gram(gram_II: Tensor, x_TI: Tensor) -> None:
    """Add Xᵀ X to the lower triangle of a float32 ``gram``; what lies above is left undefined.

    bfloat16 inputs are multiplied as such (exactly, summed in float32) where the processor can.
    """
    if x_TI.dtype is torch.bfloat16 and x_TI.device.type == "cpu" and not why_not(*_SOURCE):
        x_TI = x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()
        function(*_SOURCE, "add_gram", _ARGUMENTS)(
            x_TI.data_ptr(), *x_TI.shape, x_TI.stride(0), gram_II.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
    else:
        by_tiles(gram_II, x_TI)


def by_tiles(gram_II: Tensor, x_TI: Tensor) -> None:
    """`add_gram` as tensor operations, ``TILE`` rows at a time."""
    x_IT = x_TI.T.contiguous().float()
    with _bfloat16_products(x_TI.dtype is torch.bfloat16):
        for start in range(0, len(x_IT), TILE):
            part = slice(start, start + TILE)
            gram_II[part, : start + TILE] += linear(x_IT[part], x_IT[: start + TILE])


def mirror(gram_II: Tensor) -> Tensor:
    """Copy the lower triangle into the upper one, in place."""
    for start in range(0, len(gram_II), TILE):
        part = slice(start, start + TILE)
        gram_II[:start, part] = gram_II[part, :start].T
        lower = gram_II[part, part].tril()
        gram_II[part, part] = lower + lower.tril(-1).T
    return gram_II


@contextmanager
def _bfloat16_products(allowed: bool) -> Iterator[None]:
    """Let the CPU take float32 factors as bfloat16: lossless when they came from bfloat16."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
