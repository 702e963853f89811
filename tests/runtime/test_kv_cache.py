"""The quantized cache against rounding written out here, in models and on its own."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from support.fixtures import ModelFactory
from support.models import VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from bitwright.errors import BadRequest, BadShape
from bitwright.numerics.grids import E4M3, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR
from bitwright.numerics.rounding import decode, encode
from bitwright.runtime.kv_cache import QuantizedKVCache
from bitwright.runtime.kv_states import dequantize_states, quantize_states
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec, parse_scheme

INT8, INT4, UINT4 = IntGrid(8), IntGrid(4), IntGrid(4, signed=False)
SPECS = {
    "fp8-tensor": Spec(E4M3, PER_TENSOR, scale=torch.float32),
    "int8-tensor": Spec(INT8, PER_TENSOR, scale=torch.float32),
    "fp8-head": Spec(E4M3, PER_CHANNEL, scale=torch.float32),
    "int8-head": Spec(INT8, PER_CHANNEL, scale=torch.float32),
    "int4-head": Spec(INT4, PER_CHANNEL, scale=torch.float32),
    "fp8-token": Spec(E4M3, PER_CHANNEL, scale=torch.float32, mode="dynamic"),
    "int8-token": Spec(INT8, PER_CHANNEL, scale=torch.bfloat16, mode="dynamic"),
    "int4-token": Spec(INT4, PER_CHANNEL, scale=torch.bfloat16, mode="dynamic"),
    "int4-group": Spec(INT4, (1, 8), scale=torch.float16, mode="dynamic"),
    "uint4-token": Spec(UINT4, PER_CHANNEL, scale=torch.bfloat16, asymmetric=True, mode="dynamic"),
    "uint4-group": Spec(UINT4, (1, 8), scale=torch.float16, asymmetric=True, mode="dynamic"),
}
ARCHITECTURES = ["llama", "mistral", "gemma3", "gpt-neox", "opt"]


def rounded(x_BHTD: Tensor, spec: Spec, scale_H: Tensor | None) -> Tensor:
    """The same rounding, written with loops over heads and groups."""
    x, out = x_BHTD.float(), torch.empty(x_BHTD.shape)
    grid = spec.grid
    if spec.mode == "static":
        assert scale_H is not None
        for head in range(x.shape[1]):
            scale = scale_H[head if len(scale_H) > 1 else 0]
            out[:, head] = decode(encode(x[:, head] / scale, grid), grid) * scale
        return out.to(x_BHTD.dtype)
    assert isinstance(spec.scale, torch.dtype)
    width = x.shape[-1] if spec.group[1] == -1 else spec.group[1]
    for first in range(0, x.shape[-1], width):
        part = x[..., first : first + width]
        zero = torch.zeros(1)
        if spec.asymmetric:
            assert isinstance(grid, IntGrid)
            low = part.amin(-1, keepdim=True).clamp(max=0)
            high = part.amax(-1, keepdim=True).clamp(min=0)
            scale = ((high - low) / 15).to(spec.scale).float()
            scale[scale == 0] = 1  # a padding token's values may all be zero
            zero = (-torch.round(low / scale)).clamp(0, 15)
        else:
            scale = (part.abs().amax(-1, keepdim=True) / grid.largest).to(spec.scale).float()
            scale[scale == 0] = 1
        scaled = part / scale if not spec.asymmetric else torch.round(part / scale) + zero
        out[..., first : first + width] = (
            decode(encode(scaled.contiguous(), grid), grid) - zero
        ) * scale
    return out.to(x_BHTD.dtype)


class RoundingCache(DynamicCache):  # type: ignore[misc]
    """A 16-bit cache that is fed keys and values rounded by `rounded`."""

    def __init__(self, config: Any, spec: Spec, scales: dict[int, CacheScales]) -> None:
        super().__init__(config=config)
        self.spec, self.scales = spec, scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        own = self.scales.get(layer_idx)
        key = rounded(key_states, self.spec, own and own.key)
        value = rounded(value_states, self.spec, own and own.value)
        return super().update(key, value, layer_idx, *args, **kwargs)


def some_scales(spec: Spec, layers: int, heads: int) -> dict[int, CacheScales]:
    if spec.mode == "dynamic":
        return {}
    count = 1 if spec.group == PER_TENSOR else heads
    half = 3.0 / spec.grid.largest  # some values lie beyond and saturate
    return {
        i: CacheScales(torch.rand(count) * half + half, torch.rand(count) * half / 4 + half / 4)
        for i in range(layers)
    }


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def heads_of(model: Any) -> int:
    return int(getattr(model.config, "num_key_value_heads", model.config.num_attention_heads))


def caches(model: Any, spec: Spec) -> tuple[QuantizedKVCache, RoundingCache]:
    scales = some_scales(spec, model.config.num_hidden_layers, heads_of(model))
    return QuantizedKVCache(model.config, spec, scales), RoundingCache(model.config, spec, scales)


def test_every_float16_rounds_to_e4m3_as_ml_dtypes_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    x = torch.from_numpy(finite.astype(np.float32)).view(1, 1, 1, -1)
    codes = quantize_states(x.clone(), SPECS["fp8-tensor"], torch.ones(1)).codes.flatten()
    clipped = np.clip(finite.astype(np.float32), -448, 448)
    expected = clipped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert torch.equal(codes, encode(x.flatten(), E4M3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SPECS)
def test_states_are_rounded_as_written_out(name: str, dtype: torch.dtype) -> None:
    spec = SPECS[name]
    x = (torch.randn(2, 3, 7, 16) * torch.rand(2, 3, 7, 1) * 4).to(dtype)
    before = x.clone()
    own = some_scales(spec, 1, 3).get(0)
    scale = None if own is None else own.key
    states = quantize_states(x, spec, scale)
    assert torch.equal(x, before)
    assert states.codes.dtype is torch.uint8
    assert states.codes.shape[-1] == (8 if spec.grid.bits == 4 else 16)
    back = dequantize_states(states, spec, scale, dtype)
    assert back.dtype is dtype
    assert torch.equal(back, rounded(x, spec, scale))


def test_a_token_of_zeros_stays_zero() -> None:
    x = torch.zeros(1, 1, 2, 16)
    for spec in SPECS.values():
        if spec.mode == "dynamic":
            states = quantize_states(x, spec, None)
            assert torch.equal(dequantize_states(states, spec, None, torch.float32), x)


def test_bytes_are_those_of_the_small_types(llama: Path) -> None:
    config = load(llama).config
    batch, heads, tokens, width = 3, 2, 100, 16
    x = torch.randn(batch, heads, tokens, width)
    values = 2 * 2 * x.numel()  # layers, keys and values
    plain = DynamicCache(config=config)
    vectors = 2 * 2 * batch * heads * tokens
    expected = {
        "fp8-tensor": values + 2 * 2 * 4,
        "int8-head": values + 2 * 2 * heads * 4,
        "int4-head": values // 2 + 2 * 2 * heads * 4,
        "fp8-token": values + vectors * 4,
        "int4-token": values // 2 + vectors * 2,
        "uint4-group": values // 2 + vectors * 2 * (2 + 1),
    }
    for name, count in expected.items():
        cache = QuantizedKVCache(config, SPECS[name], some_scales(SPECS[name], 2, heads))
        for layer in range(2):
            cache.update(x, x, layer)
            plain.update(x.bfloat16(), x.bfloat16(), layer)
        assert cache.nbytes == count, name
    sixteen = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert sixteen / len(expected) == 2 * values  # all six appended to one plain cache


def test_growing_keeps_little_room_and_copies_seldom(llama: Path) -> None:
    spec = SPECS["int4-token"]
    cache = QuantizedKVCache(load(llama).config, spec)
    x = torch.randn(1, 2, 1000, 16)
    exact = QuantizedKVCache(load(llama).config, spec)
    exact.update(x, x, 0)
    sizes = set()
    for token in range(1000):
        step = x[:, :, token : token + 1]
        states = cache.update(step, step, 0)
        sizes.add(cache.nbytes)
    assert len(sizes) < 40
    assert exact.nbytes <= cache.nbytes <= exact.nbytes * 1.15
    assert torch.equal(states[0], rounded(x, spec, None))


@pytest.mark.parametrize("name", SPECS)
def test_generation_equals_fake_quantized_states(name: str, llama: Path) -> None:
    compare_generation(load(llama), SPECS[name])


@pytest.mark.parametrize("name", ["fp8-tensor", "uint4-group"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str, name: str, model_of: ModelFactory) -> None:
    compare_generation(load(model_of(architecture)), SPECS[name])


def compare_generation(model: Any, spec: Spec) -> None:
    """Two rows of different length, padded on the left; longer than the sliding windows."""
    tokens = torch.randint(1, VOCABULARY, (2, 28))
    mask = torch.ones_like(tokens)
    tokens[1, :9] = 0
    mask[1, :9] = 0
    results = []
    for cache in (*caches(model, spec), None):
        torch.manual_seed(3)
        out = model.generate(
            input_ids=tokens, attention_mask=mask, past_key_values=cache, max_new_tokens=14,
            min_new_tokens=14, do_sample=False, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        results.append((out.sequences, torch.stack(out.logits)))
    (own, own_logits), (expected, expected_logits), (_, unrounded) = results
    assert torch.equal(own, expected)
    torch.testing.assert_close(own_logits, expected_logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(own_logits[0], unrounded[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int8-tensor", "uint4-group"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_beams_are_reordered(architecture: str, name: str, model_of: ModelFactory) -> None:
    model = load(model_of(architecture))
    tokens = torch.randint(1, VOCABULARY, (2, 20))
    out = [
        model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), past_key_values=cache,
            num_beams=3, max_new_tokens=12, do_sample=False,
        )
        for cache in caches(model, SPECS[name])
    ]  # fmt: skip
    assert torch.equal(*out)


@pytest.mark.parametrize("name", ["fp8-head", "int4-token", "uint4-group"])
def test_one_forward_equals_many(name: str, llama: Path) -> None:
    model = load(llama)
    scales = some_scales(SPECS[name], 2, 2)
    tokens = torch.randint(1, VOCABULARY, (1, 30))
    with torch.no_grad():
        whole = model(
            input_ids=tokens, past_key_values=QuantizedKVCache(model.config, SPECS[name], scales)
        ).logits
        cache = QuantizedKVCache(model.config, SPECS[name], scales)
        steps = [
            model(input_ids=tokens[:, i : i + 1], past_key_values=cache).logits for i in range(30)
        ]
    # Keys computed alone differ in their last bits and may round to a neighbour now and then.
    close = (torch.cat(steps, 1) - whole).abs() <= 1e-3 * whole.abs().amax()
    assert close.float().mean() > 0.95


@pytest.mark.parametrize("name", SPECS)
def test_rows_and_tokens_can_be_chosen(name: str, llama: Path) -> None:
    spec = SPECS[name]
    cache = QuantizedKVCache(load(llama).config, spec, some_scales(spec, 2, 2))
    x, y, new = torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 1, 16)
    for layer in range(2):
        keys, values = cache.update(x, y, layer)
    cache.crop(-4)
    assert cache.get_seq_length() == 5
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    more = cache.update(new, new, 1)
    assert torch.equal(more[0][:, :, :5], keys[[2, 0, 0], :, :5])
    assert torch.equal(more[1][:, :, :5], values[[2, 0, 0], :, :5])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    last = cache.update(new[:2], new[:2], 1)
    assert torch.equal(last[0][:, :, :6], more[0][[0, 1]])
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    cache.reset()
    assert torch.equal(cache.update(x, y, 1)[0], keys)


def test_a_full_sliding_window_is_not_cropped(model_of: ModelFactory) -> None:
    model = load(model_of("mistral"))
    cache, plain = QuantizedKVCache(model.config, SPECS["int4-token"]), DynamicCache(
        config=model.config
    )  # fmt: skip
    x = torch.randn(1, 2, 20, 16)
    cache.update(x, x, 0)
    plain.update(x, x, 0)
    cache.layers[0].crop(-3)
    plain.layers[0].crop(-3)
    for _ in range(3):
        assert cache.get_mask_sizes(20, 0) == plain.get_mask_sizes(20, 0)
        assert cache.get_seq_length() == plain.get_seq_length()
        assert cache.update(x, x, 0)[0].shape == plain.update(x, x, 0)[0].shape
    with pytest.raises(BadRequest, match="sliding"):
        cache.layers[0].crop(-1)
    assert not cache.is_croppable
    size = cache.nbytes
    cache.update(x, x, 0)
    assert cache.nbytes == size
    cache.reset()
    assert cache.get_seq_length() == 0


def test_what_cannot_be_held_is_refused(llama: Path) -> None:
    config = load(llama).config
    with pytest.raises(BadRequest, match="calibrate"):
        QuantizedKVCache(config, SPECS["fp8-tensor"])
    for spec in (
        Spec(IntGrid(6), PER_CHANNEL, mode="dynamic"),
        Spec(INT8, PER_TENSOR, mode="dynamic"),
        Spec(INT8, (1, 8)),
        Spec(UINT4, PER_TENSOR, asymmetric=True),
    ):
        with pytest.raises(BadRequest, match="4 or 8 bits"):
            QuantizedKVCache(config, spec)
    x = torch.randn(1, 2, 3, 16)
    three = {i: CacheScales(torch.ones(3), torch.ones(3)) for i in range(2)}
    with pytest.raises(BadShape, match="3 scales do not fit 2"):
        QuantizedKVCache(config, SPECS["int8-head"], three).update(x, x, 0)
    with pytest.raises(BadShape, match="group size 12"):
        QuantizedKVCache(config, Spec(INT4, (1, 12), mode="dynamic")).update(x, x, 0)
    odd = torch.randn(1, 2, 3, 15)
    with pytest.raises(BadShape, match="odd"):
        QuantizedKVCache(config, SPECS["int4-token"]).update(odd, odd, 0)
    with pytest.raises(BadRequest, match="offload"):
        QuantizedKVCache(config, SPECS["int4-token"]).offload(0, False)


def test_named_schemes_make_caches(llama: Path) -> None:
    config = load(llama).config
    for name in ("W4A16-KV8-FP8", "W4A16-KV8-INT8", "W4A16-KV4"):
        spec = parse_scheme(name).kv_cache
        assert spec is not None
        QuantizedKVCache(config, spec, some_scales(spec, 2, 2))
