"""W4A16 on a CPU: the compiled kernel, or panels of tensor operations where it cannot run.

The weight stays packed on both paths: at most one panel of it is ever expanded.
"""

import ctypes

import torch
from torch import Tensor
from torch.nn.functional import linear

from bitwright.kernels.layouts import LANES, CpuWeight, split_terms, unpack_cpu_rows
from bitwright.native import function, why_not

PANEL = 4  # tiles of 64 channels that the fallback expands at a time
_SOURCE = ("bitwright.kernels", "cpu_w4a16.cpp")
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ARGUMENTS = (
    _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _POINTER, _FLOAT,
    _POINTER, _INT, _LONG, _LONG, _INT,
)  # fmt: skip
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def why_not_compiled() -> str:
    """Why the compiled kernel cannot run on this machine; "" if it can."""
    return why_not(*_SOURCE)


def w4a16(x_MI: Tensor, w: CpuWeight) -> Tensor:
    """x W^T + bias, (M, I) -> (M, O), both bfloat16, float16 or float32 on the CPU.

    Compiled: products are exact and summed in float32; float16 and float32 inputs are split into
    two and three bfloat16 terms, so their cost rises with M (see docs/kernels.md).
    """
    if w.order_I is not None:
        x_MI = x_MI[:, w.order_I]
    if why_not_compiled():
        return by_panels(x_MI, w)
    return compiled(x_MI, w)


def compiled(x_MI: Tensor, w: CpuWeight) -> Tensor:
    """`w4a16` through the compiled kernel, columns of ``x_MI`` in stored order."""
    rows, cols = x_MI.shape
    terms = split_terms(x_MI).contiguous()
    out = torch.empty(rows, w.shape[0], dtype=x_MI.dtype)
    function(*_SOURCE, "w4a16", _ARGUMENTS)(
        terms.data_ptr(), terms.shape[0], rows, cols,
        w.words_TKJL.data_ptr(), w.scale_TGN.data_ptr(), KINDS[w.scale_TGN.dtype],
        None if w.zero_TGN is None else w.zero_TGN.data_ptr(), w.table.data_ptr(),
        None if w.bias_O is None else w.bias_O.data_ptr(), w.factor,
        out.data_ptr(), KINDS[out.dtype], w.shape[0], w.group_size, torch.get_num_threads(),
    )  # fmt: skip
    return out


def by_panels(x_MI: Tensor, w: CpuWeight) -> Tensor:
    """`w4a16` as tensor operations: one panel of rows at a time is expanded and multiplied."""
    out = torch.empty(x_MI.shape[0], w.shape[0], dtype=x_MI.dtype)
    for first in range(0, w.words_TKJL.shape[0], PANEL):
        begin, end = first * LANES, min((first + PANEL) * LANES, w.shape[0])
        panel = unpack_cpu_rows(w, first, first + PANEL)[: end - begin] * w.factor
        bias = None if w.bias_O is None else w.bias_O[begin:end].to(x_MI.dtype)
        out[:, begin:end] = linear(x_MI, panel.to(x_MI.dtype), bias)
    return out
