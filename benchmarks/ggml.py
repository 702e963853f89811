"""llama.cpp's own quantizer, through ctypes.

LIBRARY, wherever a benchmark asks for it, is any shared library that exports
``ggml_quantize_chunk``, the function `llama-quantize` calls for every tensor: libggml-base.so of a
llama.cpp build, or the extension module of the package xllamacpp.
"""

import ctypes

import gguf
import numpy as np
import torch
from torch import Tensor

from bitwright.formats.gguf import BLOCK_SHAPES


def load_library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def quantized_rows(
    library: ctypes.CDLL, weight_OI: Tensor, kind: str, importance_I: Tensor | None
) -> Tensor:
    """uint8 (O, bytes of a row): a float32 weight as GGUF type ``kind``.

    ``importance_I``: the row of llama.cpp's importance matrix, mean squares of the inputs.
    """
    rows, cols = weight_OI.shape
    values = np.ascontiguousarray(weight_OI.float().numpy())
    weights, size = BLOCK_SHAPES[kind]
    data = np.zeros((rows, cols // weights * size), dtype=np.uint8)
    matrix = None if importance_I is None else np.ascontiguousarray(importance_I.float().numpy())
    library.ggml_quantize_chunk(
        int(gguf.GGMLQuantizationType[kind]), values.ctypes.data, data.ctypes.data, 0, rows, cols,
        None if matrix is None else matrix.ctypes.data,
    )  # fmt: skip
    return torch.from_numpy(data)
