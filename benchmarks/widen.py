"""A Llama model whose every input width is a multiple of 256, computing what the original does.

    python benchmarks/widen.py MODEL OUT

GGUF's K types need rows of whole super-blocks; SmolLM2-135M is 576 wide. The residual stream gets
channels that are always zero, appended at its end: zero columns in the embedding and in all that
reads it, zero rows in all that writes to it. Heads are added as whole groups of one key head
whose weights are zero, in and out. RMSNorm divides by the mean square over more channels, of
which the new ones hold nothing; with n channels made m, norm_m(x) = sqrt(m / n) norm_n(x) where
eps_m = eps_n n / m, so the reading weights are multiplied by sqrt(n / m) in float64 and rounded
once to the dtype of the checkpoint. Nothing is left to gain from the new channels: their inputs
are exactly zero, for every quantizer.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SUPER = 256


def padded(weight: Tensor, rows: int, cols: int) -> Tensor:
    """``weight`` in the upper left corner of zeros (rows, cols)."""
    out = torch.zeros(rows, cols, dtype=weight.dtype)
    out[: weight.shape[0], : weight.shape[1]] = weight
    return out


def widened(width: int) -> int:
    return -(-width // SUPER) * SUPER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    source = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    old = source.config
    if old.model_type != "llama" or old.tie_word_embeddings or old.intermediate_size % SUPER:
        raise SystemExit("for untied llama models whose MLP width is a multiple of 256")
    width, groups, dim = old.hidden_size, old.num_key_value_heads, old.head_dim
    repeat = old.num_attention_heads // groups
    wide, wide_groups = widened(width), groups
    while wide_groups * repeat * dim % SUPER:
        wide_groups += 1
    config = type(old)(
        **old.to_dict()
        | {
            "hidden_size": wide,
            "num_attention_heads": wide_groups * repeat,
            "num_key_value_heads": wide_groups,
            "rms_norm_eps": old.rms_norm_eps * width / wide,
        }
    )
    model = AutoModelForCausalLM.from_config(config, dtype=source.dtype)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    gain = math.sqrt(width / wide)
    readers = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    state = {}
    for name, weight in source.state_dict().items():
        if weight.dim() == 1:
            state[name] = torch.cat([weight, weight.new_ones(shapes[name][0] - len(weight))])
            continue
        factor = gain if name.split(".")[-2] in readers else 1.0
        state[name] = padded((weight.double() * factor).to(weight.dtype), *shapes[name])
    model.load_state_dict(state)
    model.generation_config = source.generation_config
    model.save_pretrained(options.out)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


if __name__ == "__main__":
    main()
