"""Keys rounded for their queries: what is seen of a model, and attention through the cache."""

from pathlib import Path

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import VOCABULARY
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import bitwright
from bitwright.errors import BadRequest, BadShape, UnknownName, UnsupportedModel
from bitwright.numerics.feedback import feedback_for
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR
from bitwright.runtime.key_feedback import key_feedback
from bitwright.runtime.kv_cache import QuantizedKVCache
from bitwright.runtime.kv_states import dequantize_states, quantize_states
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec, parse_scheme

SPECS = {
    "fp8-tensor": Spec(E4M3, PER_TENSOR, scale=torch.float32),
    "int8-head": Spec(IntGrid(8), PER_CHANNEL, scale=torch.float32),
    "fp8-token": Spec(E4M3, PER_CHANNEL, scale=torch.bfloat16, mode="dynamic"),
    "int4-token": Spec(IntGrid(4), PER_CHANNEL, scale=torch.bfloat16, mode="dynamic"),
    "uint4-group": Spec(IntGrid(4, signed=False), (1, 8), torch.bfloat16, True, mode="dynamic"),
}


def tokens(batch: int = 2, length: int = 48) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def test_it_is_made_of_the_queries_and_keys_of_every_head(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    text = tokens(1, 30)
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(module, query, key, value, mask, **kwargs):  # type: ignore[no-untyped-def]
        seen.append((query[0], key[0]))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    found = key_feedback(model, text)
    AttentionInterface.register("spy", spy)
    model.set_attn_implementation("spy")
    with torch.no_grad():
        model(input_ids=text, use_cache=False)
    assert found.keys() == {0, 1}
    for layer, (query_QTD, key_HTD) in enumerate(seen):
        assert len(found[layer]) == len(key_HTD) == 2
        for head, one in enumerate(found[layer]):
            q_ND = query_QTD[2 * head : 2 * head + 2].flatten(0, 1)
            wanted = feedback_for(q_ND.T @ q_ND, key_HTD[head].square().sum(0))
            assert torch.equal(one.order_C, wanted.order_C)
            torch.testing.assert_close(one.upper_CC, wanted.upper_CC, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_logits_of_attention_lose_less(name: str) -> None:
    """One head's keys, a few strong directions of queries: as attention has them."""
    spec = SPECS[name]
    keys = torch.randn(1, 1, 300, 16) * torch.linspace(0.2, 3, 16)
    queries = torch.randn(200, 2) @ torch.randn(2, 16) + 0.05 * torch.randn(200, 16)
    feedback = [feedback_for(queries.T @ queries, keys[0, 0].square().sum(0))]
    scale = keys.abs().amax().reshape(1) / spec.grid.largest if spec.mode == "static" else None
    wanted = queries @ keys[0, 0].T

    def error(*rounding: object) -> float:
        states = quantize_states(keys, spec, scale, *rounding)  # type: ignore[arg-type]
        back = dequantize_states(states, spec, scale, torch.float32)
        return float((queries @ back[0, 0].T - wanted).square().mean())

    assert error(feedback) < 0.5 * error()


@pytest.mark.parametrize("name", SPECS)
def test_a_cache_stores_the_same_bytes_and_one_forward_equals_many(name: str, llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    spec, ids = SPECS[name], tokens()
    feedback = key_feedback(model, tokens(4))
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=plain)
    scales = {}
    if spec.mode == "static":
        for layer, states in enumerate(plain.layers):
            amax = (states.keys.abs().amax(), states.values.abs().amax())
            key, value = (a.reshape(1) / spec.grid.largest for a in amax)
            scales[layer] = CacheScales(key, value)
    whole = QuantizedKVCache(model.config, spec, scales, feedback)
    steps = QuantizedKVCache(model.config, spec, scales, feedback)
    nearest = QuantizedKVCache(model.config, spec, scales)
    with torch.no_grad():
        at_once = model(input_ids=ids, past_key_values=whole).logits
        parts = [
            model(input_ids=part, past_key_values=steps).logits
            for part in ids.split([20, 1, 1, 26], 1)
        ]
        other = model(input_ids=ids, past_key_values=nearest).logits
    # A near tie may round apart where sums differ in their last bits.
    assert float((torch.cat(parts, 1) - at_once).abs().mean()) < 2e-3
    assert not torch.equal(at_once, other)
    assert whole.nbytes == nearest.nbytes


def test_sliding_windows_and_left_padding(model_of: ModelFactory) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_of("gemma3"), dtype=torch.float32)
    feedback = key_feedback(model, tokens(2, 40))
    assert feedback.keys() == {0, 1}
    ids = tokens(2, 24)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    spec = SPECS["fp8-token"]
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0,
        past_key_values=QuantizedKVCache(model.config, spec, {}, feedback),
    )  # fmt: skip
    alone = model.generate(
        input_ids=ids[:1, 7:], max_new_tokens=10, do_sample=False, pad_token_id=0,
        attention_mask=mask[:1, 7:],
        past_key_values=QuantizedKVCache(model.config, spec, {}, feedback),
    )  # fmt: skip
    assert torch.equal(out[0, 24:], alone[0, 17:])


def test_through_the_command_of_a_checkpoint(llama: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    bitwright.quantize(llama, folder, scheme="W8A16", group_size=-1, kv_cache="fp8",
                       kv_scales="head", calibration=str(text), samples=4,
                       sequence_length=64)  # fmt: skip

    def scores(rounding: str) -> float:
        return bitwright.evaluate(
            folder, text=str(text), windows=2, sequence_length=64, kv_rounding=rounding
        ).perplexity

    assert scores("feedback") != scores("nearest")
    assert bitwright.generate(folder, "A quick", max_new_tokens=3, kv_rounding="feedback")
    with pytest.raises(UnknownName, match="nearest, feedback"):
        scores("away")


def test_cache_scales_are_chosen_by_name() -> None:
    scheme = parse_scheme("W8A16-KV8-INT8")
    assert scheme.with_kv_scales("tensor") == scheme
    head = scheme.with_kv_scales("head").kv_cache
    assert head == Spec(IntGrid(8), PER_CHANNEL, scale=torch.float32)
    token = scheme.with_kv_scales("token").kv_cache
    assert token == Spec(IntGrid(8), PER_CHANNEL, scale=torch.bfloat16, mode="dynamic")
    with pytest.raises(BadRequest, match="--kv-cache"):
        parse_scheme("W8A16").with_kv_scales("head")


def test_what_cannot_be_seen_or_does_not_fit_is_refused(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    with pytest.raises(UnsupportedModel, match="scaled_dot_product_attention"):
        key_feedback(model, tokens(1, 8))
    one = feedback_for(torch.eye(16), torch.ones(16))
    with pytest.raises(BadShape, match="feedback for 1 heads"):
        quantize_states(torch.randn(1, 2, 3, 16), SPECS["fp8-token"], None, [one])
