"""Calibrated cache scales against a plain forward of the finished model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import ARCHITECTURES, VOCABULARY
from torch import Tensor, nn
from transformers import DynamicCache

from bitwright.errors import UnknownName, UnsupportedModel
from bitwright.formats import get_format
from bitwright.numerics.grids import E4M3, Grid, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, Group
from bitwright.numerics.rounding import decode, encode
from bitwright.pipeline.cache_scales import (
    PERCENTILE,
    SEARCHES,
    attentions,
    cache_argument,
    cache_scale,
    checkpoint_name,
    magnitudes,
    merge,
    observing,
)
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.run import quantize_checkpoint
from bitwright.pipeline.topology import discover
from bitwright.runtime.load import load_model
from bitwright.schemes.plan import Calibration, Layer, Plan
from bitwright.schemes.scheme import Scheme, Spec


def spec_of(grid: Grid, group: Group) -> Spec:
    return Spec(grid, group, scale=torch.float32)


@pytest.mark.parametrize("group", [PER_TENSOR, PER_CHANNEL], ids=["tensor", "head"])
@pytest.mark.parametrize("grid", [E4M3, IntGrid(8)], ids=["fp8", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scales_are_the_largest_states_of_the_finished_model(
    architecture: str, grid: Grid, group: Group, model_of: ModelFactory, tmp_path: Path
) -> None:
    tokens = torch.randint(1, VOCABULARY, (5, 32))
    folder = quantized(model_of(architecture), tmp_path / "out", spec_of(grid, group), tokens)
    model = load_model(open_checkpoint(folder), dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
    stored = open_checkpoint(folder)
    tensors = stored.read(name for name in stored.tensors if name[-8:] in ("_k_scale", ".k_scale",
                                                                          ".v_scale"))  # fmt: skip
    assert len(tensors) == 4
    for layer in range(2):
        names = [name for name in tensors if f"layers.{layer}." in name]
        owner = names[0].rpartition(".")[0]
        assert any(f"{owner}.{leaf}" in stored.tensors for leaf in leaves_of(architecture))
        for letter, states in (("k", cache.layers[layer].keys), ("v", cache.layers[layer].values)):
            amax = states.abs().amax() if group == PER_TENSOR else states.abs().amax((0, 2, 3))
            shape = (1,) if group == PER_TENSOR else (states.shape[1], 1, 1)
            found = tensors[f"{owner}.{letter}_scale"]
            assert found.shape == shape
            expected = (amax / grid.largest).reshape(shape)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def leaves_of(architecture: str) -> tuple[str, ...]:
    fused = {"phi3": "qkv_proj", "gpt-neox": "query_key_value"}
    return (f"{fused.get(architecture, 'k_proj')}.weight_packed",)


def quantized(source: Path, target: Path, kv_cache: Spec, tokens: Tensor, **options: Any) -> Path:
    """A checkpoint with 8-bit weights and the given cache."""
    checkpoint = open_checkpoint(source)
    topology = discover(checkpoint)
    scheme = Scheme(Spec(IntGrid(8), (1, -1)), kv_cache=kv_cache)
    layers = tuple(
        Layer(name, (linear.out_features, linear.in_features), scheme)
        for block in topology.linears
        for name, linear in block.items()
    )
    calibration = Calibration("given", *tokens.shape)
    plan = Plan(scheme, "rtn", "compressed-tensors", layers, calibration, 0,
                {"search": "absmax", **options})  # fmt: skip
    fmt = get_format("compressed-tensors")
    quantize_checkpoint(checkpoint, topology, target, plan, fmt, tokens_NT=tokens)
    return target


def test_the_search_of_the_plan_is_used(llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(1, VOCABULARY, (3, 32))
    spec = spec_of(IntGrid(8), PER_TENSOR)
    scales = {}
    for search in SEARCHES:
        folder = quantized(llama, tmp_path / search, spec, tokens, kv_search=search)
        name = "model.layers.0.self_attn.k_scale"
        scales[search] = float(open_checkpoint(folder).read([name])[name])
    assert scales["percentile"] < scales["absmax"]
    assert scales["mse"] <= scales["absmax"]


def test_prefixes_may_differ() -> None:
    source = {"model.layers.0.attn.k.weight": "layers.0.attn.k.weight"}
    assert checkpoint_name("model.layers.0.attn", source) == "layers.0.attn"
    assert checkpoint_name("model.layers.0.at", source) == "model.layers.0.at"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magnitudes_of_parts_are_those_of_the_whole(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 10, 8).to(dtype)
    whole, parts = magnitudes(x), merge(magnitudes(x[:2]), magnitudes(x[2:]))
    assert torch.equal(whole.amax_H, x.abs().amax((0, 2, 3)).float())
    assert torch.equal(whole.amax_H, parts.amax_H)
    assert torch.equal(whole.counts_HM, parts.counts_HM)
    assert whole.counts_HM.sum(1).tolist() == [480] * 3
    for head in range(3):
        distinct = x[:, head].bfloat16().abs().unique()
        assert int((whole.counts_HM[head] > 0).sum()) == len(distinct)


@pytest.mark.parametrize("group", [PER_TENSOR, PER_CHANNEL], ids=["tensor", "head"])
def test_percentile_leaves_out_the_largest(group: Group) -> None:
    x = torch.rand(1, 2, 400, 100).bfloat16()
    x[0, 1] *= 2
    x[0, :, 0, 0] = 1000.0
    found = cache_scale(magnitudes(x), spec_of(E4M3, group), "percentile") * 448
    heads = [x] if group == PER_TENSOR else [x[:, :1], x[:, 1:]]
    expected = [torch.quantile(h.float().flatten(), PERCENTILE / 100) for h in heads]
    assert found.tolist() == pytest.approx([float(e) for e in expected], rel=2**-7)
    absmax = cache_scale(magnitudes(x), spec_of(E4M3, group), "absmax")
    assert absmax.tolist() == pytest.approx([1000 / 448] * len(heads))


@pytest.mark.parametrize("grid", [E4M3, IntGrid(8), IntGrid(4)], ids=["fp8", "int8", "int4"])
def test_mse_has_the_least_error_of_all_ranges(grid: Grid) -> None:
    x = torch.randn(1, 2, 500, 16).pow(3).bfloat16()
    spec = spec_of(grid, PER_CHANNEL)
    found, absmax = (cache_scale(magnitudes(x), spec, search) for search in ("mse", "absmax"))

    def error(scale: Tensor, head: int) -> float:
        h = x[0, head].float().abs()
        return float((decode(encode(h / scale, grid), grid) * scale - h).square().sum())

    for head in range(2):
        least = min(
            error(absmax[head] * ratio, head) for ratio in torch.linspace(0.45, 1, 64).tolist()
        )
        assert error(found[head], head) <= least * (1 + 1e-5)
    if isinstance(grid, IntGrid):
        assert bool((found < absmax).all())


def test_zeros_have_a_usable_scale() -> None:
    seen = magnitudes(torch.zeros(1, 2, 3, 4))
    for search in SEARCHES:
        assert cache_scale(seen, spec_of(E4M3, PER_CHANNEL), search).tolist() == [1.0, 1.0]


def test_unknown_searches_are_refused() -> None:
    with pytest.raises(UnknownName, match="absmax, percentile, mse"):
        cache_scale(magnitudes(torch.ones(1, 1, 1, 1)), spec_of(E4M3, PER_TENSOR), "max")  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attentions_are_found_by_running(architecture: str, model_of: ModelFactory) -> None:
    model = load_model(open_checkpoint(model_of(architecture)))
    handles = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found = attentions(model)
    assert sorted(found) == [0, 1]
    for layer, name in found.items():
        assert f"layers.{layer}." in name
        assert model.get_submodule(name).layer_idx == layer
    after = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert handles == after


class Renamed(nn.Module):
    """A block whose names no table could know."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.zorp = inner

    def forward(self, x: Tensor, memory: "DynamicCache | None" = None) -> Tensor:
        return self.zorp(x, memory)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def forward(self, x: Tensor, memory: Any) -> Tensor:
        if memory is not None:
            memory.update(x[:, None], 2 * x[:, None], 7)
        return x


class Forgetful(nn.Module):
    def forward(self, x: Tensor, memory: Any) -> Tensor:
        return x


def test_nothing_depends_on_names() -> None:
    block = Renamed(Attention())
    assert cache_argument(block) == "memory"
    with observing(block) as observer:
        block(torch.full((1, 2, 4), -3.0))
        block(torch.full((2, 2, 4), 5.0))
    seen = observer.seen["zorp"]
    assert (seen.layer, list(observer.seen)) == (7, ["zorp"])
    scales = seen.scales(spec_of(IntGrid(8), PER_TENSOR))
    assert (float(scales.key), float(scales.value)) == pytest.approx((5 / 127, 10 / 127))


def test_blocks_that_use_no_cache_are_refused() -> None:
    block = Renamed(Forgetful())
    with pytest.raises(UnsupportedModel, match="puts no keys"), observing(block):
        block(torch.ones(1, 2, 4))
    with pytest.raises(UnsupportedModel, match="0 arguments"), observing(nn.Linear(2, 2)):
        pass


def test_the_config_tells_the_cache(llama: Path, tmp_path: Path) -> None:
    tokens = torch.randint(1, VOCABULARY, (2, 16))
    fmt = get_format("compressed-tensors")
    static = [spec_of(g, p) for g in (E4M3, IntGrid(8)) for p in (PER_TENSOR, PER_CHANNEL)]
    dynamic = [
        Spec(IntGrid(4), (1, -1), mode="dynamic"),
        Spec(IntGrid(4), (1, 8), mode="dynamic"),
        Spec(IntGrid(4, signed=False), (1, 8), asymmetric=True, mode="dynamic"),
        Spec(E4M3, (1, -1), mode="dynamic"),
    ]
    for index, spec in enumerate(static + dynamic):
        folder = quantized(llama, tmp_path / str(index), spec, tokens)
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert fmt.cache_spec(config) == spec
