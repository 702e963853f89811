"""What a run did, layer by layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitwright.schemes.plan import Plan


@dataclass(frozen=True)
class LayerReport:
    """What became of one Linear.

    ``error`` is relative: of the output where calibrated, else of the weight (``measured``
    says which). ``fold`` is the exponent of the input scale folded in front of it, if any.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    method: str
    bits_per_weight: float
    error: float | None = None
    measured: str = ""
    fold: float | None = None
    fallback: str = ""
    ignored: str = ""


@dataclass(frozen=True)
class BlockCost:
    """What one block took: seconds of its own, and the process's peak memory when it was done."""

    seconds: float
    peak_rss_bytes: int


@dataclass
class Report:
    """The result of a run; everything but times and memory goes into the output folder."""

    plan: Plan
    layers: list[LayerReport] = field(default_factory=list)
    refinement: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    blocks: list[BlockCost] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The part that is a function of model, plan and text alone."""
        found = len(self.plan.layers)
        return {
            "plan": self.plan.to_json(),
            "fingerprint": self.plan.fingerprint,
            "bits_per_weight": self.plan.bits_per_weight,
            "linears": {
                "found": found,
                "quantized": len(self.plan.quantized),
                "ignored": found - len(self.plan.quantized),
            },
            "notes": list(self.plan.notes),
            "refinement": self.refinement,
            **({"training": self.training} if self.training else {}),
            "layers": [row_json(row) for row in self.layers],
        }

    def block_json(self, first: int) -> dict[str, Any]:
        """The last block: its layers, which are those from line ``first`` on, and its cost."""
        return {
            "layers": [row_json(row) for row in self.layers[first:]],
            "cost": vars(self.blocks[-1]),
        }

    def restore(self, block: Mapping[str, Any]) -> None:
        """Append a block that an earlier run finished, from its `block_json`."""
        for row in block["layers"]:
            self.layers.append(LayerReport(**row | {"shape": tuple(row["shape"])}))
        self.blocks.append(BlockCost(**block["cost"]))

    def add_ignored(self) -> None:
        """List the layers that were left alone, with their reasons."""
        for layer in self.plan.layers:
            if layer.scheme is None:
                self.layers.append(
                    LayerReport(
                        layer.name, layer.shape, "W16A16", "none", 16.0, ignored=layer.ignored
                    )
                )


def row_json(row: LayerReport) -> dict[str, Any]:
    """A layer's line without its empty fields."""
    return {key: value for key, value in vars(row).items() if value not in ("", None)}
