"""Plan: every decision that shapes the output, made before any compute."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitwright.numerics.groups import dividing_sizes
from bitwright.schemes.scheme import Scheme


@dataclass(frozen=True)
class Calibration:
    """Where calibration tokens come from: a path, "pydoc", "self" or a hub dataset."""

    source: str
    samples: int
    sequence_length: int


@dataclass(frozen=True)
class Layer:
    """One Linear: its size and either its scheme or the reason it is left alone."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    ignored: str = ""


@dataclass(frozen=True)
class Plan:
    """What will be done. Two runs with equal fingerprints on one model give equal bytes."""

    scheme: Scheme
    method: str
    format: str
    layers: tuple[Layer, ...]
    calibration: Calibration | None
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> dict[str, Layer]:
        """The layers that will be quantized, by name."""
        return {layer.name: layer for layer in self.layers if layer.scheme is not None}

    @property
    def bits_per_weight(self) -> float:
        """Mean stored bits over the weights of the quantized layers."""
        bits, count = 0.0, 0
        for layer in self.quantized.values():
            assert layer.scheme is not None
            size = layer.shape[0] * layer.shape[1]
            bits += layer.scheme.weight.bits_per_value(layer.shape) * size
            count += size
        return bits / count if count else 16.0

    @property
    def needs_samples(self) -> bool:
        """Whether calibration keeps what input scales are chosen by."""
        inputs = self.scheme.input
        return inputs is not None

    def to_json(self) -> dict[str, Any]:
        """A JSON value with everything that shapes the output."""
        return {
            "scheme": self.scheme.name,
            "group_size": self.scheme.weight.group[1],
            "asymmetric": self.scheme.weight.asymmetric,
            "weight": repr(self.scheme.weight),
            "input": repr(self.scheme.input),
            "kv_cache": repr(self.scheme.kv_cache),
            "method": self.method,
            "format": self.format,
            "calibration": asdict(self.calibration) if self.calibration else None,
            "seed": self.seed,
            "options": dict(self.options),
            "layers": {
                layer.name: layer.scheme.name if layer.scheme else f"ignored: {layer.ignored}"
                for layer in self.layers
            },
        }

    @property
    def fingerprint(self) -> str:
        """Hash of `to_json`."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def automatic_group_size(widths: list[int]) -> tuple[int, str]:
    """(group size, note for the user): 128, or the largest of 64 and 32 dividing every width.

    Where none divides, -1: one scale per output channel.
    """
    sizes = [g for g in dividing_sizes(widths) if g in (128, 64, 32)]
    if 128 in sizes:
        return 128, ""
    size = sizes[0] if sizes else -1
    odd = next(width for width in widths if width % 128)
    chosen = f"group size {size}" if sizes else "one scale per output channel"
    return size, f"an input width of {odd} is not a multiple of 128: using {chosen}"
