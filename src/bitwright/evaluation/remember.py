"""A reference that is asked about the same windows again and again answers from memory."""

from typing import Any

import torch
from torch import Tensor


class Remembered:
    """A causal language model as `evaluate_model` uses one, whose hidden states are kept.

    Keeps (positions x width) numbers per window, in the model's own precision; logits are
    computed anew. `__call__` (whole logits) is passed on.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config
        self._known: dict[bytes, Any] = {}

    def base_model(self, *, input_ids: Tensor, **arguments: Any) -> Any:
        """The model's output without its head."""
        key = input_ids.to(torch.int64).numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.model.base_model(input_ids=input_ids, **arguments)
        return self._known[key]

    def get_output_embeddings(self) -> Any:
        """The model's head."""
        return self.model.get_output_embeddings()

    def __call__(self, **arguments: Any) -> Any:
        """The model's output with its head, computed anew."""
        return self.model(**arguments)
