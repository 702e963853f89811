"""Q4_K, Q5_K and Q6_K by bitwright and by llama.cpp's own quantizer, on the weights of a model.

    python benchmarks/kquants.py MODEL LIBRARY [--layers N]

See ggml.py for LIBRARY; gguf_quality.py compares whole models in perplexity. Inputs are synthetic:
correlated, with log-normal channel sizes, the same for both sides; llama.cpp gets their mean
squares as its importance matrix. Prints one JSON object per type with mean relative errors.
"""

import argparse
import ctypes
import json
import sys
import time
from pathlib import Path

import gguf
import torch
from ggml import load_library, quantized_rows
from gguf.quants import dequantize as gguf_dequantize

from bitwright.methods.kquant import kquant
from bitwright.methods.objective import relative_output_error
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import parse_scheme
from bitwright.schemes.stats import InputStats


def theirs(
    library: ctypes.CDLL, weight: torch.Tensor, kind: str, importance: torch.Tensor | None
) -> torch.Tensor:
    data = quantized_rows(library, weight, kind, importance).numpy()
    return torch.from_numpy(gguf_dequantize(data, gguf.GGMLQuantizationType[kind]))


def inputs(width: int, seed: int) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    x = torch.randn(2 * width, width, generator=generator)
    x = x @ (mix + 0.3 * torch.eye(width)) * torch.exp(torch.randn(width, generator=generator))
    return InputStats(x.T @ x / len(x), x.abs().mean(0), x.abs().amax(0), tokens=len(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("library")
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    library = load_library(options.library)
    checkpoint = open_checkpoint(options.model)
    names = sorted(
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith("_proj.weight") and info.shape[1] % 256 == 0
    )
    if not names:
        sys.exit("no layer has a width that 256 divides")
    names = names[:: max(1, len(names) // options.layers)][: options.layers]
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        spec = parse_scheme(kind).weight
        sums: dict[str, float] = {}
        for index, name in enumerate(names):
            weight = checkpoint.read([name])[name].float()
            stats = inputs(weight.shape[1], index)
            importance = stats.hessian_II.diagonal()
            start = time.perf_counter()
            plain = dequantize(kquant(weight, None, spec))
            seconds = time.perf_counter() - start
            made = {
                "llama.cpp": theirs(library, weight, kind, None),
                "llama.cpp, imatrix": theirs(library, weight, kind, importance),
                "bitwright": plain,
                "bitwright, importance": dequantize(kquant(weight, stats, spec)),
                "bitwright, gptq": dequantize(kquant(weight, stats, spec, damp=0.01)),
            }
            for tool, value in made.items():
                error = relative_output_error(weight, value, stats.hessian_II)
                sums[f"output error: {tool}"] = sums.get(f"output error: {tool}", 0) + error
            for tool in ("llama.cpp", "bitwright"):
                error = float((made[tool] - weight).norm() / weight.norm())
                sums[f"weight error: {tool}"] = sums.get(f"weight error: {tool}", 0) + error
            sums["bitwright seconds"] = sums.get("bitwright seconds", 0) + seconds
        means = {key: value / len(names) for key, value in sums.items()}
        print(json.dumps({"type": kind, "layers": names, **means}))


if __name__ == "__main__":
    main()
