"""Keys and values rounded as a quantized cache rounds them, with gradients."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from bitwright.errors import UnsupportedModel
from bitwright.numerics.straight_through import pass_through
from bitwright.runtime.kv_cache import check_cache_spec
from bitwright.runtime.kv_states import dequantize_states, quantize_states
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec


def straight_through_states(x_BHTD: Tensor, spec: Spec, scale_H: Tensor | None) -> Tensor:
    """Keys or values as the cache would give them back; gradient zero where they saturate."""
    detached = x_BHTD.detach()
    if scale_H is not None:
        scale_H = scale_H.to(x_BHTD.device)
    value = dequantize_states(quantize_states(detached, spec, scale_H), spec, scale_H, x_BHTD.dtype)
    inside = None
    if scale_H is not None:
        inside = detached.abs() <= scale_H.view(-1, 1, 1) * spec.grid.largest
    return pass_through(x_BHTD, value, inside)


class RoundingLayer(DynamicLayer):  # type: ignore[misc]
    """One attention's cache that stores nothing: it returns what it is given, rounded.

    One forward over a whole sequence attends through it exactly as through `QuantizedLayer`;
    storing nothing, it may be called again when activations are recomputed.
    """

    def __init__(self, spec: Spec, scales: CacheScales | None) -> None:
        super().__init__()
        self._spec = spec
        self._key = None if scales is None else scales.key.float()
        self._value = None if scales is None else scales.value.float()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The same states (B, H, T, D), rounded."""
        return (
            straight_through_states(key_states, self._spec, self._key),
            straight_through_states(value_states, self._spec, self._value),
        )

    def get_seq_length(self) -> int:
        """Nothing is ever stored."""
        return 0


class RoundingCache(Cache):  # type: ignore[misc]
    """For one forward pass in training; see `runtime.kv_cache.QuantizedKVCache`.

    Raises UnsupportedModel where the model keeps anything but plain keys and values.
    """

    def __init__(self, config: Any, spec: Spec, scales: Mapping[int, CacheScales] = {}) -> None:
        check_cache_spec(spec)
        layers = []
        for index, plain in enumerate(DynamicCache(config=config).layers):
            if type(plain) is not DynamicLayer:
                raise UnsupportedModel(
                    f"attention layer {index} keeps a {type(plain).__name__}: train with a "
                    "16-bit cache"
                )
            layers.append(RoundingLayer(spec, scales.get(index)))
        super().__init__(layers=layers)
