"""Types only: what the pipeline asks of a format. Formats themselves live at a higher rank."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from bitwright.schemes.quantized import CacheScales, QuantizedLinear
from bitwright.schemes.scheme import Scheme, Spec


class Format(Protocol):
    """A pair of pure functions between a QuantizedLinear and named tensors, and a config."""

    @property
    def name(self) -> str:
        """What `--format` calls it."""
        ...

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """The dtype weight scales are stored in; None if any will do."""
        ...

    @property
    def group_size(self) -> int | None:
        """The group size that "auto" stands for; None to choose by the model's widths."""
        ...

    @property
    def symmetric(self) -> bool:
        """Whether weights without zero points can be stored."""
        ...

    def fitted(self, scheme: Scheme, shape: tuple[int, int]) -> Scheme:
        """What a layer of this shape gets in place of ``scheme``: mostly just that."""
        ...

    def check(self, name: str, shape: tuple[int, int], scheme: Scheme) -> None:
        """Raises BadRequest or BadShape if a layer of this shape cannot be stored."""
        ...

    def encode(self, name: str, q: QuantizedLinear) -> dict[str, Tensor]:
        """The tensors that hold ``q``, by their full names."""
        ...

    def decode(
        self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> QuantizedLinear:
        """Inverse of `encode`; ``config`` is the one `config` wrote."""
        ...

    def check_cache(self, spec: Spec) -> None:
        """Raises BadRequest if keys and values stored so cannot be recorded."""
        ...

    def encode_cache(self, attention: str, scales: CacheScales) -> dict[str, Tensor]:
        """The tensors of an attention's key and value scales; ``attention`` is its full name."""
        ...

    def decode_cache(self, attention: str, tensors: Mapping[str, Tensor]) -> CacheScales | None:
        """Inverse of `encode_cache`; None if there are no scales."""
        ...

    def cache_spec(self, config: Mapping[str, Any]) -> Spec | None:
        """How keys and values are stored, from what `config` wrote; None for 16 bits."""
        ...

    def quantized_names(self, tensor_names: set[str]) -> set[str]:
        """The layers among ``tensor_names`` that this format stores."""
        ...

    def config(self, layers: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
        """The value of ``quantization_config`` in config.json."""
        ...

    def ignored(self, config: Mapping[str, Any]) -> list[str]:
        """The layers that ``config`` says were left in 16 bits."""
        ...

    def companions(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files that readers of this format look for, by file name."""
        ...
