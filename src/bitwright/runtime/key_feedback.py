"""How to round each head's keys: from the queries a model asks on some text.

A key counts only through its products with queries, most of whose energy lies in a few
directions. Nearest rounding ignores that; `numerics.feedback` does not. Codes and scales stay
those of the format: only which of the neighbouring codes is stored changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from bitwright.errors import UnsupportedModel
from bitwright.numerics.feedback import Feedback, feedback_for
from bitwright.pipeline.cache_scales import CacheObserver, observing


def key_feedback(model: Any, tokens_NT: Tensor) -> dict[int, Sequence[Feedback]]:
    """Layer index -> feedback of each key-value head, from a forward pass over ``tokens_NT``.

    ``tokens_NT``: int64 windows of ordinary text. Raises UnsupportedModel if attention does not
    go through torch's scaled_dot_product_attention, or not from keys as they are cached.
    """
    with torch.no_grad(), observing(model) as observer, _Products(observer) as products:
        for window in tokens_NT:
            model(input_ids=window[None].to(model.device), use_cache=True, logits_to_keep=1)
    if not products.grams:
        raise UnsupportedModel(
            f"{type(model).__name__} does not attend through scaled_dot_product_attention: its "
            "queries cannot be seen, round keys to nearest"
        )
    return {
        layer: [feedback_for(g, p) for g, p in zip(gram, products.power[layer], strict=True)]
        for layer, gram in products.grams.items()
    }


class _Products(TorchFunctionMode):
    """Sums over queries and keys, by layer: float32 (H, D, D) and (H, D)."""

    def __init__(self, observer: CacheObserver) -> None:
        super().__init__()
        self.observer = observer
        self.grams: dict[int, Tensor] = {}
        self.power: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self._add(*args[:2])
        return func(*args, **(kwargs or {}))

    def _add(self, query_BQTD: Tensor, key_BKTD: Tensor) -> None:
        seen = self.observer.seen.get(self.observer.running[-1])
        if seen is None:
            return
        heads = len(seen.key.amax_H)
        if query_BQTD.shape[1] % heads or key_BKTD.shape[1] % heads:
            return
        q_HND = _by_head(query_BQTD, heads).flatten(1, 3)
        k_HND = _by_head(key_BKTD, heads)[:, :, 0].flatten(1, 2)
        gram, power = q_HND.transpose(1, 2) @ q_HND, k_HND.square().sum(1)
        if seen.layer in self.grams:
            gram, power = self.grams[seen.layer] + gram, self.power[seen.layer] + power
        self.grams[seen.layer], self.power[seen.layer] = gram, power


def _by_head(x_BQTD: Tensor, heads: int) -> Tensor:
    """(B, H * n, T, D) -> (H, B, n, T, D), float32: the n heads that share a key-value head."""
    batch, _, tokens, width = x_BQTD.shape
    return x_BQTD.float().reshape(batch, heads, -1, tokens, width).transpose(0, 1)
