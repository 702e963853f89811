"""Tiny random checkpoints of many architectures, saved as a hub download would be."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
SENTENCES = (
    "A quick brown fox jumps over the lazy dog while it rains.",
    "Numbers are stored in few bits, and every layer keeps its own scale.",
    "She sold seven shells by the sea; he counted them twice, then once more.",
    "The second law says that heat flows from the warm to the cold.",
)
TEXT = "\n".join(f"{i}. {SENTENCES[i % 4]} {SENTENCES[i * 7 % 4][::-1]}" for i in range(80))

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GATED = _SIZES | {"intermediate_size": 128, "num_key_value_heads": 2}
_OPT = {"ffn_dim": 128, "init_std": 0.15, "do_layer_norm_before": True}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GATED),
    "mistral": ("mistral", _GATED | {"sliding_window": 32}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", _GATED | {"head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        _GATED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16,
                  "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", _GATED),
    "opt": ("opt", _SIZES | _OPT),
    "opt-projected": ("opt", _SIZES | _OPT | {"word_embed_proj_dim": 32}),
    "gpt-neox": ("gpt_neox", _SIZES | {"intermediate_size": 128}),
}  # fmt: skip


_EXPERTS = _GATED | {"num_experts_per_tok": 2}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": (
        "qwen3_moe",
        _EXPERTS | {"num_experts": 6, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "deepseek-v3": (  # the first block dense, then shared and routed experts
        "deepseek_v3",
        _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32,
                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
                    "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4},
    ),
    "gpt-oss": (
        "gpt_oss",
        _EXPERTS | {"num_local_experts": 4, "head_dim": 16, "sliding_window": 32},
    ),
}  # fmt: skip

SCALED = {  # their logits are more than the output embedding of the hidden states
    "granite": ("granite", _GATED | {"logits_scaling": 8.0}),
    "cohere": ("cohere", _GATED | {"logit_scale": 0.25}),
}


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    )
    fast.save_pretrained(folder)


def make_model(
    folder: Path,
    architecture: str = "llama",
    *,
    shard: str = "5GB",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Save a random model and its tokenizer into ``folder``; returns it."""
    kind, settings = (ARCHITECTURES | SCALED | EXPERTS)[architecture]
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **(settings | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer(folder)
    return folder


def make_text(path: Path) -> Path:
    """A text of a few thousand tokens."""
    path.write_text(TEXT, encoding="utf-8")
    return path


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers itself computes, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return logits(model, tokens)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits for a batch of tokens."""
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return out.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative distance of two tensors."""
    return float((a - b).norm() / b.norm())
