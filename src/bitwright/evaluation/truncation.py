"""A key-value cache in FP8 that rounds toward zero, as vLLM 0.32 does on x86 CPUs.

Its kernel drops the bits that E4M3 has no room for, where the scheme (and its GPU kernels) round
to the nearest value. Measured on one block in float32: log-probabilities differ by 0.02 from this
cache, by 0.33 from one that rounds to nearest.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from bitwright.numerics.grids import E4M3
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.runtime.kv_load import read_cache_scales
from bitwright.runtime.load import format_of, stored_config
from bitwright.schemes.quantized import CacheScales


def truncating_cache(checkpoint: Checkpoint, model: Any) -> Callable[[], DynamicCache] | None:
    """Makes an empty cache for each use; None unless the checkpoint has a static FP8 cache."""
    fmt = format_of(checkpoint)
    spec = fmt.cache_spec(stored_config(checkpoint)) if fmt else None
    if fmt is None or spec is None or spec.grid != E4M3 or spec.mode != "static":
        return None
    scales = read_cache_scales(checkpoint, fmt, model)
    return lambda: _Truncating(scales)


def toward_zero(x: Tensor) -> Tensor:
    """Every value at the next value of E4M3 that is not larger in magnitude, as float32.

    >>> toward_zero(torch.tensor([1.1249, -1.1249, 1000.0])).tolist()
    [1.0, -1.0, 448.0]
    """
    nearest = x.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    up = nearest.float().abs() > x.abs()
    code = nearest.view(torch.uint8).to(torch.int16) - up.to(torch.int16)
    return code.to(torch.uint8).view(torch.float8_e4m3fn).float()


class _Truncating(DynamicCache):  # type: ignore[misc]
    """Keys and values of transformers' plain cache, rounded on their way in."""

    def __init__(self, scales: Mapping[int, CacheScales]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store and return all keys and values (B, H, T, D) of a layer so far."""
        found = self._scales[layer_idx]
        rounded = [
            (toward_zero(x / scale) * scale).to(x.dtype)
            for x, scale in (
                (key_states, found.key[:, None, None]), (value_states, found.value[:, None, None])
            )
        ]  # fmt: skip
        out: tuple[Tensor, Tensor] = super().update(*rounded, layer_idx, *args, **kwargs)
        return out
