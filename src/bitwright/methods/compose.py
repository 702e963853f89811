"""Method names: a reparametrization, then a solver, then tuning, joined by plus signs."""

from dataclasses import dataclass
from typing import Literal

from bitwright.errors import UnknownName

Solver = Literal["rtn", "gptq", "obq"]
Fold = Literal["awq", "smoothquant"]


@dataclass(frozen=True)
class Method:
    """The steps a method name stands for.

    ``fold``: the input scales searched first; ``solver``: how codes are chosen; ``tune``:
    whether all scales are then tuned end to end.
    """

    solver: Solver
    fold: Fold | None = None
    tune: bool = False

    @property
    def needs_calibration(self) -> bool:
        """Whether input statistics are required."""
        return self.solver != "rtn" or self.fold is not None or self.tune


METHODS = {
    "rtn": Method("rtn"),
    "gptq": Method("gptq"),
    "obq": Method("obq"),
    "awq": Method("rtn", fold="awq"),
    "smoothquant": Method("rtn", fold="smoothquant"),
    "awq+gptq": Method("gptq", fold="awq"),
    "smoothquant+gptq": Method("gptq", fold="smoothquant"),
    "gptq+tune": Method("gptq", tune=True),
    "awq+tune": Method("rtn", fold="awq", tune=True),
    "smoothquant+gptq+tune": Method("gptq", fold="smoothquant", tune=True),
    "best": Method("gptq", fold="awq", tune=True),
}


def parse_method(name: str) -> Method:
    """The steps of ``name``. Raises UnknownName, which lists the known names."""
    if name not in METHODS:
        raise UnknownName(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
