"""The key-value cache that a checkpoint asks for."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bitwright.errors import BadCheckpoint
from bitwright.pipeline.cache_scales import attentions
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.runtime.key_feedback import key_feedback
from bitwright.runtime.kv_cache import QuantizedKVCache, check_cache_spec
from bitwright.runtime.load import format_of, stored_config
from bitwright.schemes.protocols import Format
from bitwright.schemes.quantized import CacheScales

LARGEST = 1 << 12  # values in a tensor of cache scales


def cache_factory(
    checkpoint: Checkpoint, model: Any, text_NT: Tensor | None = None
) -> Callable[[], QuantizedKVCache] | None:
    """Makes an empty cache for each use; None if the checkpoint's cache has 16 bits.

    ``model``: the checkpoint, loaded. ``text_NT``: int64 windows of text; with them keys are
    rounded for the queries they meet (`key_feedback`), without to nearest, as other runtimes do.
    Raises BadCheckpoint if scales are missing, BadRequest if bitwright has no such cache,
    UnsupportedModel if its queries cannot be seen.
    """
    fmt = format_of(checkpoint)
    spec = fmt.cache_spec(stored_config(checkpoint)) if fmt else None
    if fmt is None or spec is None:
        return None
    check_cache_spec(spec)
    scales = {} if spec.mode == "dynamic" else read_cache_scales(checkpoint, fmt, model)
    feedback = {} if text_NT is None else key_feedback(model, text_NT)
    return lambda: QuantizedKVCache(model.config, spec, scales, feedback)


def read_cache_scales(checkpoint: Checkpoint, fmt: Format, model: Any) -> dict[int, CacheScales]:
    """Layer index -> scales of every attention of ``model``. Raises BadCheckpoint."""
    stored = _small_tensors(checkpoint)
    prefix = f"{model.base_model_prefix}."
    out = {}
    for layer, module in attentions(model).items():
        names = (module, module.removeprefix(prefix), prefix + module)
        found = (fmt.decode_cache(name, stored) for name in names)
        scales = next((one for one in found if one is not None), None)
        if scales is None:
            raise BadCheckpoint(
                f"config.json promises static cache scales, but {module} has none: "
                "quantize the model again"
            )
        out[layer] = scales
    return out


def _small_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    small = []
    for name, info in checkpoint.tensors.items():
        count = 1
        for side in info.shape:
            count *= side
        if count <= LARGEST and info.dtype.is_floating_point:
            small.append(name)
    return checkpoint.read(small)
