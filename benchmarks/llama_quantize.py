"""A model quantized by llama.cpp's own quantizer, written as GGUF by bitwright.

    python benchmarks/llama_quantize.py MODEL OUT --type Q4_K --library LIBRARY \
        [--calibration valid.txt --samples 64 --sequence-length 512]

The same matrices get the same types as `bitwright quantize --format gguf` gives them (as
`llama-quantize --pure` does, fallback types for odd widths included), so that both files have the
same size. With --calibration llama.cpp gets its importance matrix: the mean square of every input
channel of every matrix, over the windows that bitwright calibrates on. See ggml.py for LIBRARY.
"""

import argparse
from pathlib import Path

import torch
from ggml import load_library, quantized_rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitwright.api import calibration_tokens
from bitwright.formats.gguf import type_of
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.request import prepare
from bitwright.runtime.gguf_export import Blocks, export_gguf
from bitwright.runtime.load import load_model
from bitwright.schemes.plan import Calibration

SCHEMES = {
    "Q4_0": ("W4A16", False), "Q4_1": ("W4A16", True), "Q8_0": ("W8A16", False),
    "Q5_0": ("W5A16", False), "Q5_1": ("W5A16", True),
}  # fmt: skip


@torch.no_grad()
def importance_matrix(source: Checkpoint, tokens_NT: Tensor) -> dict[str, Tensor]:
    """Linear -> mean square of each of its input channels, float64 (I,)."""
    model = load_model(source)
    sums: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):

            def add(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
                total_I = args[0].double().flatten(0, -2).square().sum(0)
                sums[name] = sums.get(name, 0) + total_I

            module.register_forward_pre_hook(add)
    for row_T in tokens_NT:
        model.model(input_ids=row_T[None], use_cache=False)
    return {name: total_I / tokens_NT.numel() for name, total_I in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True)
    parser.add_argument("--library", required=True)
    parser.add_argument("--calibration")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--matrix", type=Path, help="keep the importance matrix in this file")
    options = parser.parse_args()
    library = load_library(options.library)
    scheme, asymmetric = SCHEMES.get(options.type, (options.type, False))
    prepared = prepare(options.model, scheme=scheme, asymmetric=asymmetric, format="gguf")
    source, layers = prepared.source, prepared.plan.quantized
    matrix: dict[str, Tensor] = {}
    if options.calibration is not None:
        if options.matrix is not None and options.matrix.exists():
            matrix = load_file(options.matrix)
        else:
            calibration = Calibration(options.calibration, options.samples, options.sequence_length)
            matrix = importance_matrix(source, calibration_tokens(source, calibration, 0)[0])
            if options.matrix is not None:
                save_file(matrix, options.matrix)
    blocks = {name: Blocks(type_of(layer.scheme), layer.shape) for name, layer in layers.items()}

    def quantized(name: str) -> Tensor:
        weight_OI = source.read([f"{name}.weight"])[f"{name}.weight"]
        row_I = matrix[name] if matrix else None
        return quantized_rows(library, weight_OI, blocks[name].kind, row_I)

    size = export_gguf(
        source, blocks, quantized, options.out, overwrite=True, report={},
        progress=lambda done, total, note: None,
    )  # fmt: skip
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
