"""Counting from config.json."""

from pathlib import Path

import pytest
from planning.conftest import SMALL, WriteConfig
from transformers import AutoConfig, AutoModelForCausalLM

from bitwright.errors import BadCheckpoint, UnsupportedModel
from bitwright.planning.model import CacheLayer, Matrices, model_facts

LINEAR = 64 * 64 + 2 * 32 * 64 + 64 * 64  # q, k, v, o
MLP = 3 * 64 * 128


def test_llama_2_70b(llama70: Path) -> None:
    facts = model_facts(llama70)
    block = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    assert facts.linear_parameters == 80 * block == 68_451_041_280
    assert facts.parameters == 80 * block + 2 * 32000 * 8192 + 161 * 8192 == 68_976_648_192
    assert facts.other == 161 * 8192
    assert facts.multiplied == 80 * block + 32000 * 8192
    assert (facts.layers, facts.heads, facts.head_width, facts.experts) == (80, 64, 128, 0)
    assert facts.caches == (CacheLayer(2 * 8 * 128, 128, None),) * 80
    assert set(facts.linears) == {
        Matrices((8192, 8192), 160, 160),
        Matrices((1024, 8192), 160, 160),
        Matrices((28672, 8192), 160, 160),
        Matrices((8192, 28672), 80, 80),
    }


def test_small_model_counts_what_it_holds(llama: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama)
    facts = model_facts(llama)
    assert facts.parameters == sum(p.numel() for p in network.parameters())
    parts = facts.linear_parameters + facts.other + 2 * 320 * 64
    assert parts == facts.parameters


def test_tied_embeddings_are_counted_once(config: WriteConfig) -> None:
    untied = model_facts(config(model_type="llama", **SMALL, tie_word_embeddings=False))
    tied = model_facts(config(model_type="llama", **SMALL, tie_word_embeddings=True))
    assert untied.parameters - tied.parameters == 320 * 64
    assert (tied.tied, tied.output) == (True, None)
    assert (untied.tied, untied.output) == (False, (320, 64))
    assert tied.multiplied == untied.multiplied == 3 * (LINEAR + MLP) + 320 * 64


def test_experts(config: WriteConfig) -> None:
    facts = model_facts(
        config(model_type="mixtral", **SMALL, num_local_experts=8, num_experts_per_tok=2)
    )
    assert (facts.experts, facts.experts_chosen) == (8, 2)
    assert facts.linear_parameters == 3 * (LINEAR + 8 * MLP)
    assert facts.multiplied == 3 * (LINEAR + 2 * MLP) + 320 * 64
    assert facts.other == 3 * 8 * 64 + 7 * 64  # routers and norms
    whole = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mixtral", **SMALL, num_local_experts=8, num_experts_per_tok=2)
    )
    assert facts.parameters == sum(p.numel() for p in whole.parameters())


def test_shared_experts_multiply_every_token(config: WriteConfig) -> None:
    facts = model_facts(
        config(
            model_type="qwen2_moe",
            **SMALL,
            num_experts=4,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=96,
            decoder_sparse_step=1,
        )
    )
    routed, shared = 3 * 64 * 32, 3 * 64 * 96 + 64
    assert facts.multiplied - 320 * 64 == 3 * (LINEAR + routed + shared)
    assert facts.linear_parameters == 3 * (LINEAR + 4 * routed + shared)


def test_sliding_windows(config: WriteConfig) -> None:
    facts = model_facts(config(model_type="mistral", **SMALL, sliding_window=32))
    assert [c.window for c in facts.caches] == [32, 32, 32]
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    facts = model_facts(
        config(model_type="gemma3_text", **SMALL, head_dim=16, sliding_window=16, layer_types=kinds)
    )
    assert [c.window for c in facts.caches] == [16, 16, None]
    assert [c.tokens(100) for c in facts.caches] == [16, 16, 100]
    assert [c.tokens(9) for c in facts.caches] == [9, 9, 9]
    off = model_facts(config(model_type="qwen2", **SMALL, sliding_window=8))
    assert [c.window for c in off.caches] == [None] * 3


def test_compressed_keys_and_values(config: WriteConfig) -> None:
    """Multi-head latent attention keeps one latent vector and one rotary key per token."""
    settings = SMALL | {"num_key_value_heads": 4}
    facts = model_facts(
        config(model_type="deepseek_v3", **settings, kv_lora_rank=24, q_lora_rank=16,
               qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=4,
               num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1,
               n_group=1, topk_group=1)
    )  # fmt: skip
    assert {c.values for c in facts.caches} == {32}
    assert facts.experts_chosen == 2


def test_quantized_folders_are_counted_unquantized(config: WriteConfig) -> None:
    plain = model_facts(config(model_type="llama", **SMALL))
    quantized = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert model_facts(config(model_type="llama", **SMALL, quantization_config=quantized)) == plain


def test_refusals(config: WriteConfig, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="does not exist"):
        model_facts(tmp_path / "missing")
    with pytest.raises(BadCheckpoint, match="no model_type"):
        model_facts(config(hidden_size=64))
    with pytest.raises(UnsupportedModel, match="unheard"):
        model_facts(config(model_type="unheard"))
    with pytest.raises(UnsupportedModel, match="own code"):
        model_facts(config(model_type="llama", **SMALL, auto_map={"AutoConfig": "x.Y"}))
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    with pytest.raises(BadCheckpoint, match="JSON"):
        model_facts(broken)
