"""What formats that hold nothing but weights have in common."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bitwright.errors import BadRequest
from bitwright.schemes.quantized import CacheScales
from bitwright.schemes.scheme import Spec


class WeightsOnly:
    """The cache part of a Format without a place for the scales of keys and values."""

    name: str

    def check_cache(self, spec: Spec) -> None:
        """Raises BadRequest: there is no place for scales."""
        raise BadRequest(f"{self.name} cannot store the scales of a quantized cache: write "
                         "compressed-tensors or modelopt")  # fmt: skip

    def encode_cache(self, attention: str, scales: CacheScales) -> dict[str, Tensor]:
        """Raises BadRequest: there is no place for them."""
        raise BadRequest(f"{attention}: {self.name} cannot store the scales of a quantized cache")

    def decode_cache(self, attention: str, tensors: Mapping[str, Tensor]) -> CacheScales | None:
        """None."""
        return None

    def cache_spec(self, config: Mapping[str, Any]) -> Spec | None:
        """None."""
        return None
