"""Whether the sizes in config.json can be those of the tensors stored, before a model is built.

A model is built without weights, but not for nothing: a million layers are a million modules, and
the tables of rotary embeddings are real. Sizes are therefore compared with the headers first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from bitwright.errors import BadCheckpoint
from bitwright.pipeline.checkpoint import Checkpoint

PACKED = 64  # a stored side may stand for this many times its length: 32-bit words of small codes
_COUNTS = re.compile(r"^(num_|n_)?(\w+_)?(layers?|experts|blocks)$|^depth$")
_SIZES = re.compile(r"size|dim|width|rank|heads|embd|ffn|inner|channels|groups|states")
_OTHERS = re.compile(r"window|position|token|theta|max_|_ids?$|per_tok")


def require_plausible(checkpoint: Checkpoint) -> None:
    """Raises BadCheckpoint, naming the entry, for a size far beyond all tensors.

    A config.json read without tensors, as for `bitwright plan`, has nothing to be compared with.
    """
    if not checkpoint.tensors:
        return
    infos = checkpoint.tensors.values()
    largest = max((side for info in infos for side in info.shape), default=1)
    stacked = max((info.shape[0] for info in infos if len(info.shape) > 2), default=0)
    limits = ((_COUNTS, max(len(checkpoint.tensors), stacked)), (_SIZES, PACKED * largest))
    for key, value in _integers(checkpoint.config):
        for pattern, limit in limits:
            if pattern.search(key) and not _OTHERS.search(key) and value > limit:
                raise BadCheckpoint(
                    f"config.json says {key} {value}, far more than the tensors stored could hold"
                )


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Keys and values of all integers, those of inner objects included."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _integers(value)
        elif isinstance(value, int):
            yield key, value
