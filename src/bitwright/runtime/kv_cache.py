"""A transformers Cache that holds keys and values as codes and scales.

Keys (after rotary embedding) and values have the shape (B, H, T, D): batch, key-value heads,
tokens, head width. Every vector of D values is rounded once, when it arrives, and never again:
attention sees the dequantized keys and values in the model's dtype, those of the tokens being
processed included. One forward over a whole window therefore measures the same cache as
generating it token by token. (Some runtimes let a prompt attend to its own unrounded keys and
read rounded ones only afterwards; there, only generation shows the error of the cache.)

What a `Spec` means here:

| mode    | group                 | scales                                                     |
|---------|-----------------------|------------------------------------------------------------|
| static  | (-1, -1), per tensor  | one per layer for keys, one for values, given              |
| static  | (1, -1), per head     | H per layer for keys, H for values, given                  |
| dynamic | (1, -1), per token    | one per token and head, chosen when the token arrives      |
| dynamic | (1, g), per group     | D/g per token and head, chosen when the token arrives      |

With ``feedback`` (runtime/key_feedback.py) keys are rounded so that their products with queries
stay right; what is stored is the same kind of codes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from bitwright.errors import BadRequest, BadShape, UnsupportedModel
from bitwright.numerics.feedback import Feedback
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, scale_shape
from bitwright.runtime.kv_states import States, dequantize_states, quantize_states
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec


class _Rows:
    """A tensor (B, H, T, ...) that grows along T; appending n tokens costs n, on average."""

    def __init__(self, first: Tensor) -> None:
        self._data = first.contiguous()
        self.length = first.shape[2]

    @property
    def filled(self) -> Tensor:
        """What has been appended."""
        return self._data[:, :, : self.length]

    @property
    def nbytes(self) -> int:
        """Memory held, the room kept for later tokens included."""
        return self._data.untyped_storage().nbytes()

    def append(self, new: Tensor) -> None:
        """Add tokens at the end."""
        end = self.length + new.shape[2]
        if end > self._data.shape[2]:
            batch, heads, _, width = self._data.shape
            grown = self._data.new_empty(batch, heads, end + end // 8 + 16, width)
            grown[:, :, : self.length] = self.filled
            self._data = grown
        self._data[:, :, self.length : end] = new
        self.length = end

    def keep(self, tokens: slice) -> None:
        """Drop all but some tokens."""
        if tokens.start:
            self._data = self.filled[:, :, tokens].clone()
            self.length = self._data.shape[2]
        else:
            self.length = self.filled[:, :, tokens].shape[2]

    def select(self, rows: Tensor) -> None:
        """Put batch rows in another order, leave some out or repeat them."""
        self._data = self.filled.index_select(0, rows.to(self._data.device))


class _Half:
    """The keys or the values of one layer."""

    def __init__(
        self, spec: Spec, scale_H: Tensor | None, feedback_H: Sequence[Feedback] | None = None
    ) -> None:
        self.spec, self.scale_H, self.feedback_H = spec, scale_H, feedback_H
        self.rows: list[_Rows | None] = []

    def append(self, x_BHTD: Tensor) -> None:
        """Round and store."""
        if not self.rows:
            check_head_width(x_BHTD.shape[-1], self.spec)
        if self.scale_H is not None:
            if len(self.scale_H) not in (1, x_BHTD.shape[1]):
                raise BadShape(
                    f"{len(self.scale_H)} scales do not fit {x_BHTD.shape[1]} key-value heads: "
                    "give one scale or one per head"
                )
            self.scale_H = self.scale_H.to(x_BHTD.device)
        new = quantize_states(x_BHTD, self.spec, self.scale_H, self.feedback_H)
        parts = (new.codes, new.scale, new.zero_point)
        if not self.rows:
            self.rows = [None if part is None else _Rows(part) for part in parts]
            return
        for rows, part in zip(self.rows, parts, strict=True):
            if rows is not None and part is not None:
                rows.append(part)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Everything stored, dequantized."""
        filled = [None if rows is None else rows.filled for rows in self.rows]
        codes, scale, zero_point = filled
        assert codes is not None
        return dequantize_states(States(codes, scale, zero_point), self.spec, self.scale_H, dtype)

    @property
    def existing(self) -> list[_Rows]:
        """The tensors that this spec has."""
        return [rows for rows in self.rows if rows is not None]


class QuantizedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one attention layer."""

    def __init__(
        self,
        spec: Spec,
        scales: CacheScales | None,
        feedback_H: Sequence[Feedback] | None = None,
    ) -> None:
        super().__init__()
        self._spec, self._scales, self._feedback_H = spec, scales, feedback_H
        self._halves = self._empty()

    def _empty(self) -> tuple[_Half, _Half]:
        key, value = (None, None)
        if self._scales is not None:
            key, value = self._scales.key.float(), self._scales.value.float()
        return _Half(self._spec, key, self._feedback_H), _Half(self._spec, value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note what to dequantize to."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new states (B, H, T, D); returns all of them, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for half, states in zip(self._halves, (key_states, value_states), strict=True):
            half.append(states)
        return self._halves[0].read(self.dtype), self._halves[1].read(self.dtype)

    @property
    def nbytes(self) -> int:
        """Memory of codes and scales, room kept for later tokens and static scales included."""
        halves = self._halves
        held = sum(rows.nbytes for half in halves for rows in half.existing)
        return held + sum(half.scale_H.nbytes for half in halves if half.scale_H is not None)

    @property
    def stored_tokens(self) -> int:
        """How many tokens are stored."""
        existing = self._halves[0].existing
        return existing[0].length if existing else 0

    def get_seq_length(self) -> int:
        """How many tokens have been seen and not cropped."""
        return self.stored_tokens

    def reset(self) -> None:
        """Forget everything."""
        self._halves = self._empty()
        self.is_initialized = False

    def _each(self) -> list[_Rows]:
        return [rows for half in self._halves for rows in half.existing]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -``tokens_to_remove`` tokens, as DynamicLayer does."""
        if tokens_to_remove > 0:
            raise ValueError("give the number of tokens to remove as a negative integer")
        if tokens_to_remove < 0:
            for rows in self._each():
                rows.keep(slice(0, max(rows.length + tokens_to_remove, 0)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Batch row i becomes row ``beam_idx[i]``."""
        for rows in self._each():
            rows.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row ``repeats`` times."""
        for rows in self._each():
            index = torch.arange(rows.filled.shape[0], device=self.device)
            rows.select(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some batch rows."""
        self.reorder_cache(torch.as_tensor(indices))

    def offload(self) -> None:
        """Not offered: raises BadRequest."""
        raise BadRequest("a quantized cache cannot be offloaded: drop the offloading option")


class SlidingQuantizedLayer(QuantizedLayer):
    """A layer whose attention sees the last ``window`` tokens: older ones are dropped."""

    is_sliding = True
    is_croppable = False

    def __init__(
        self,
        spec: Spec,
        scales: CacheScales | None,
        window: int,
        feedback_H: Sequence[Feedback] | None = None,
    ) -> None:
        super().__init__(spec, scales, feedback_H)
        self.sliding_window = window
        self.cumulative_length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `QuantizedLayer.update`; what the new tokens see is returned, then trimmed."""
        states = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        excess = self.stored_tokens - self.sliding_window + 1
        if excess > 0:
            for rows in self._each():
                rows.keep(slice(excess, None))
        return states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that attention gets for ``query_length`` new tokens, position of the first)."""
        return self.stored_tokens + query_length, self.cumulative_length - self.stored_tokens

    def get_seq_length(self) -> int:
        """How many tokens have been seen."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """As for a full layer until the window is reached; then raises BadRequest."""
        if tokens_to_remove and self.cumulative_length >= self.sliding_window:
            raise BadRequest("a sliding cache that dropped tokens cannot be cropped")
        super().crop(tokens_to_remove)
        self.cumulative_length = self.stored_tokens


class QuantizedKVCache(Cache):  # type: ignore[misc]
    """Pass as ``past_key_values`` to a transformers model or its generate().

    ``scales``: those of static specs, by layer index; ``feedback``: how each head's keys are
    rounded, likewise, nearest where there is none. Layers without keys and values (linear
    attention, shared ones) are kept as transformers makes them. Raises BadRequest for a spec that
    no cache can have or a layer without its static scales, BadShape for groups that do not
    divide the head width (when it is seen), UnsupportedModel for attention of another kind.
    """

    def __init__(
        self,
        config: Any,
        spec: Spec,
        scales: Mapping[int, CacheScales] = {},
        feedback: Mapping[int, Sequence[Feedback]] = {},
    ) -> None:
        check_cache_spec(spec)
        layers = []
        for index, plain in enumerate(DynamicCache(config=config).layers):
            if not isinstance(plain, CacheLayerMixin):
                layers.append(plain)
                continue
            own = scales.get(index)
            if spec.mode == "static" and own is None:
                raise BadRequest(
                    f"attention layer {index} has no key and value scales: calibrate them, or "
                    "use a cache whose scales are chosen at run time"
                )
            own = own if spec.mode == "static" else None
            if type(plain) is DynamicSlidingWindowLayer:
                window = plain.sliding_window
                layers.append(SlidingQuantizedLayer(spec, own, window, feedback.get(index)))
            elif type(plain) is DynamicLayer:
                layers.append(QuantizedLayer(spec, own, feedback.get(index)))
            else:
                raise UnsupportedModel(
                    f"attention layer {index} keeps a {type(plain).__name__}, which cannot be "
                    "quantized: use a 16-bit cache"
                )
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Memory of all codes and scales, measured on the tensors that hold them."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, QuantizedLayer))


def check_cache_spec(spec: Spec) -> None:
    """Raises BadRequest if keys and values cannot be held this way."""
    if spec.mode == "static":
        known = spec.group in (PER_TENSOR, PER_CHANNEL) and not spec.asymmetric
    else:
        known = spec.group[0] == 1 and isinstance(spec.scale, torch.dtype)
    if spec.grid.bits not in (4, 8) or spec.two_level or not known:
        raise BadRequest(
            "keys and values are held in 4 or 8 bits, with static scales per tensor or per head "
            "(no zero points) or with run-time scales per token or per group of a token"
        )


def check_head_width(width: int, spec: Spec) -> None:
    """Raises BadShape if the spec's groups, or pairs of 4-bit codes, do not divide a head."""
    scale_shape((1, width), spec.group)
    if spec.grid.bits == 4 and width % 2:
        raise BadShape(f"a head width of {width} is odd: two 4-bit codes share a byte")
