"""Calibrated scales of the key-value cache, from the keys and values attention really stores.

While a block is replayed, an observer takes the place of its cache. It sees keys after the
rotary embedding, whatever the architecture, and passes everything on unchanged. Nothing is
looked up by name: the argument that carries the cache is the one through which keys arrive, and
an attention is the module that was running when they did.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from bitwright.errors import UnknownName, UnsupportedModel
from bitwright.numerics.grids import Grid
from bitwright.numerics.groups import PER_TENSOR
from bitwright.numerics.rounding import decode, encode
from bitwright.numerics.scales import CANDIDATES, SMALLEST_RATIO, store_scale
from bitwright.pipeline.topology import Topology
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec

CacheSearch = Literal["absmax", "percentile", "mse"]
SEARCHES: tuple[CacheSearch, ...] = ("absmax", "percentile", "mse")
PERCENTILE = 99.99
LEVELS = 1 << 15


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """What is remembered of |x| of keys or values, for each of H heads.

    ``amax_H``: float32, the largest. ``counts_HM``: int64, how often each non-negative bfloat16
    is the nearest to |x|, by its bit pattern: a histogram with relative steps of 2^-8 or finer.
    """

    amax_H: Tensor
    counts_HM: Tensor


def magnitudes(x_BHTD: Tensor) -> Magnitudes:
    """Of one batch of keys or values."""
    x_HN = x_BHTD.transpose(0, 1).flatten(1).abs()
    heads = len(x_HN)
    level_HN = x_HN.to(torch.bfloat16).view(torch.int16).int()
    offset_H1 = torch.arange(heads, device=x_HN.device, dtype=torch.int32)[:, None] * LEVELS
    counts = torch.bincount((level_HN + offset_H1).flatten(), minlength=heads * LEVELS)
    return Magnitudes(x_HN.amax(1).float(), counts.view(heads, LEVELS))


def merge(a: Magnitudes, b: Magnitudes) -> Magnitudes:
    """Of the union of two batches."""
    return Magnitudes(torch.maximum(a.amax_H, b.amax_H), a.counts_HM + b.counts_HM)


def cache_scale(seen: Magnitudes, spec: Spec, search: CacheSearch = "absmax") -> Tensor:
    """The static scale of keys or values, float32: (1,) per tensor, (H,) per head.

    "absmax": the largest magnitude falls on the largest grid value. "percentile": the one below
    which PERCENTILE of all magnitudes lie does. "mse": of CANDIDATES ranges, the one of least
    squared rounding error. Raises UnknownName for another search.
    """
    amax_S, counts_SM = seen.amax_H, seen.counts_HM
    if spec.group == PER_TENSOR:
        amax_S, counts_SM = amax_S.amax(0, keepdim=True), counts_SM.sum(0, keepdim=True)
    if search == "absmax":
        range_S = amax_S
    elif search == "percentile":
        range_S = torch.minimum(_percentile(counts_SM), amax_S)
    elif search == "mse":
        range_S = _least_error(counts_SM, amax_S, spec.grid)
    else:
        raise UnknownName(f"unknown cache calibration {search!r}; known: {', '.join(SEARCHES)}")
    return store_scale(range_S / spec.grid.largest, torch.float32)


def _levels(device: torch.device) -> Tensor:
    """All non-negative bfloat16 values by bit pattern, float32 (M,); zero where not finite."""
    level_M = torch.arange(LEVELS, device=device, dtype=torch.int16).view(torch.bfloat16).float()
    return torch.where(torch.isfinite(level_M), level_M, 0.0)


def _percentile(counts_SM: Tensor) -> Tensor:
    below_SM = counts_SM.cumsum(1)
    wanted_S1 = below_SM[:, -1:].double() * (PERCENTILE / 100)
    index_S = torch.searchsorted(below_SM.double(), wanted_S1)[:, 0]
    return _levels(counts_SM.device)[index_S.clamp(max=LEVELS - 1)]


def _least_error(counts_SM: Tensor, amax_S: Tensor, grid: Grid) -> Tensor:
    present_M = torch.nonzero(counts_SM.sum(0))[:, 0]
    level_M, counts_SM = _levels(counts_SM.device)[present_M], counts_SM[:, present_M].double()
    best_S, least_S = amax_S.clone(), torch.full_like(amax_S, torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(1.0, SMALLEST_RATIO, CANDIDATES).tolist():
        scale_S1 = store_scale(amax_S * ratio / grid.largest, torch.float32)[:, None]
        back_SM = decode(encode(level_M / scale_S1, grid), grid) * scale_S1
        error_S = (counts_SM * (back_SM - level_M).double().square()).sum(1)
        better_S = error_S < least_S
        best_S = torch.where(better_S, amax_S * ratio, best_S)
        least_S = torch.where(better_S, error_S, least_S)
    return best_S


@dataclass(frozen=True, eq=False)
class Seen:
    """One attention: its index in the cache, and its keys and values."""

    layer: int
    key: Magnitudes
    value: Magnitudes

    def scales(self, spec: Spec, search: CacheSearch = "absmax") -> CacheScales:
        """See `cache_scale`."""
        return CacheScales(
            cache_scale(self.key, spec, search), cache_scale(self.value, spec, search)
        )


def merge_seen(a: Seen, b: Seen) -> Seen:
    """One attention, of the union of two sets of batches."""
    return Seen(a.layer, merge(a.key, b.key), merge(a.value, b.value))


class CacheObserver(Cache):  # type: ignore[misc]
    """A cache that keeps nothing but statistics, by the name of the module that updated it."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen: dict[str, Seen] = {}
        self.running: list[str] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember the states; returns them as they are."""
        name = self.running[-1]
        new = Seen(layer_idx, magnitudes(key_states), magnitudes(value_states))
        if (old := self.seen.get(name)) is not None:
            new = merge_seen(old, new)
        self.seen[name] = new
        return key_states, value_states


@contextmanager
def observing(root: nn.Module) -> Iterator[CacheObserver]:
    """While open, every call of ``root`` (a block or a whole model) uses the cache given.

    Raises UnsupportedModel at the end if ``root`` was called but no keys arrived.
    """
    observer = CacheObserver()
    argument = cache_argument(root)
    called = []

    def give(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        called.append(True)
        return args, kwargs | {argument: observer}

    handles = [root.register_forward_pre_hook(give, with_kwargs=True)]
    for name, module in root.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda _, __, n=name: observer.running.append(n))
        )
        handles.append(
            module.register_forward_hook(lambda _, __, ___: _discard(observer.running.pop()))
        )
    try:
        yield observer
    finally:
        for handle in handles:
            handle.remove()
    if called and not observer.seen:
        raise UnsupportedModel(
            f"{type(root).__name__} puts no keys into the cache it is given as {argument!r}: "
            "its key-value cache cannot be calibrated"
        )


def _discard(_: object) -> None:
    """A forward hook must return None."""


def cache_argument(root: nn.Module) -> str:
    """The parameter of ``root.forward`` declared to be a Cache. Raises UnsupportedModel."""
    parameters = inspect.signature(root.forward).parameters.values()
    names = [p.name for p in parameters if _is_cache(p.annotation)]
    if len(names) != 1:
        raise UnsupportedModel(
            f"{type(root).__name__} has {len(names)} arguments that take a cache, not one: its "
            "key-value cache cannot be calibrated"
        )
    return names[0]


def _is_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return "Cache" in annotation
    members = getattr(annotation, "__args__", (annotation,))
    return any(isinstance(member, type) and issubclass(member, Cache) for member in members)


def block_scales(
    topology: Topology, index: int, seen: Mapping[str, Seen], spec: Spec, search: CacheSearch
) -> dict[str, CacheScales]:
    """Attention name in the checkpoint -> scales, for what `observing` saw of a block."""
    block = topology.block_names[index]
    return {
        checkpoint_name(f"{block}.{name}" if name else block, topology.source): one.scales(
            spec, search
        )
        for name, one in seen.items()
    }


def checkpoint_name(module: str, source: Mapping[str, str]) -> str:
    """How a checkpoint spells a module's name; ``source``: parameter -> tensor name."""
    for parameter, tensor in source.items():
        rest = parameter.removeprefix(module)
        if rest != parameter and rest.startswith(".") and tensor.endswith(rest):
            return tensor.removesuffix(rest)
    return module


def attentions(model: Any) -> dict[int, str]:
    """Index in the cache -> name of the attention module, found by running one token."""
    with torch.no_grad(), observing(model) as observer:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=True)
    return {one.layer: name for name, one in observer.seen.items()}
