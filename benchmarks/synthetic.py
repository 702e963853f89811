"""A checkpoint of random weights in the shape of a large Llama, written block by block.

    python benchmarks/synthetic.py TOKENIZER_FROM OUT --shape 7b
    python benchmarks/synthetic.py TOKENIZER_FROM OUT --shape 3b --blocks 2

Weights are normal with a standard deviation of 0.02, bfloat16. One block is drawn; the others hold
it rolled by their number of rows, which no quantizer can profit from and which is quick to write.
The tokenizer, and with it the vocabulary, is that of an existing checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {  # hidden, inner, blocks, heads, key-value heads
    "3b": (3072, 8192, 28, 24, 8),  # Llama-3.2-3B
    "7b": (4096, 11008, 32, 32, 32),  # Llama-2-7B
}


def write(
    donor: Path, out: Path, hidden: int, inner: int, blocks: int, heads: int, kv_heads: int
) -> int:
    """Write the checkpoint; returns its bytes."""
    out.mkdir(parents=True)
    vocabulary = json.loads((donor / "config.json").read_text())["vocab_size"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=1))
    for pattern in ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json"):
        for file in donor.glob(pattern):
            shutil.copyfile(file, out / file.name)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(torch.bfloat16)

    width = hidden // heads * kv_heads
    sides = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (width, hidden),
        "self_attn.v_proj": (width, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    drawn = {f"{name}.weight": random(*shape) for name, shape in sides.items()}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    drawn |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    outside = {
        "model.embed_tokens.weight": random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
        "lm_head.weight": random(vocabulary, hidden),
    }
    shards = [outside] + [
        {f"model.layers.{b}.{n}": t.roll(b, 0) for n, t in drawn.items()} for b in range(blocks)
    ]
    index, total = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (out / "model.safetensors.index.json").write_text(text)
    return total


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("donor", type=Path, help="the checkpoint whose tokenizer is taken")
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="instead of the shape's")
    args = parser.parse_args()
    hidden, inner, blocks, heads, kv_heads = SHAPES[args.shape]
    blocks = args.blocks or blocks
    size = write(args.donor, args.out, hidden, inner, blocks, heads, kv_heads)
    print(f"{args.out}: {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
