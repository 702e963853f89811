"""Golden blocks of llama.cpp: its own quantizer, with and without an importance matrix.

Run once, by an interpreter that has numpy, safetensors and xllamacpp 2026.10 (any build of
llama.cpp whose library exports these functions will do):

    python make_llamacpp.py FOLDER LIBRARY

writes FOLDER/llamacpp.safetensors: per type ``blocks`` uint8 (rows, bytes) and ``values`` float32,
what llama.cpp's own dequantization makes of them. Seeded; nothing of bitwright is imported.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROWS, COLS = 6, 512
TYPES = {  # number, weights and bytes of a block
    "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24),
    "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
}  # fmt: skip


def main() -> None:
    """Write all types."""
    library = ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(ROWS, COLS)).astype(np.float32)
    importance = generator.lognormal(size=COLS).astype(np.float32)
    tensors = {}
    for kind, (number, block, size) in TYPES.items():
        read = getattr(library, f"dequantize_row_{kind.replace('Q', 'q')}")
        read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        for name, matrix in ((kind, None), (f"{kind}-imatrix", importance.ctypes.data)):
            data = np.zeros((ROWS, COLS // block * size), dtype=np.uint8)
            library.ggml_quantize_chunk(
                number, weight.ctypes.data, data.ctypes.data, 0, ROWS, COLS, matrix
            )
            values = np.zeros((ROWS, COLS), dtype=np.float32)
            read(data.ctypes.data, values.ctypes.data, ROWS * COLS)
            tensors |= {f"{name}.blocks": data, f"{name}.values": values}
    save_file(tensors, Path(sys.argv[1]) / "llamacpp.safetensors")


if __name__ == "__main__":
    main()
