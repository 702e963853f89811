"""Method names: a reparametrization, then a solver, joined by a plus sign."""

from dataclasses import dataclass

from bitwright.errors import UnknownName

SOLVERS = ("rtn", "gptq")


@dataclass(frozen=True)
class Method:
    """The steps a method name stands for."""

    name: str
    solver: str

    @property
    def needs_calibration(self) -> bool:
        """Whether input statistics are required."""
        return self.solver != "rtn"


def parse_method(name: str) -> Method:
    """The steps of ``name``. Raises UnknownName, which lists the known names."""
    if name not in SOLVERS:
        raise UnknownName(f"unknown method {name!r}; known: {', '.join(SOLVERS)}")
    return Method(name, solver=name)
