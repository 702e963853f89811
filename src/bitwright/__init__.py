"""Quantize large language models and prove the result.

>>> import bitwright
>>> bitwright.quantize("model/", "model-W4A16/", scheme="W4A16")  # doctest: +SKIP
>>> bitwright.evaluate("model-W4A16/", reference="model/")  # doctest: +SKIP
>>> model, tokenizer = bitwright.load("model-W4A16/")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "evaluate",
    "generate",
    "inspect",
    "load",
    "make_report",
    "plan",
    "prepare",
    "quantize",
    "rotate_model",
]

if TYPE_CHECKING:
    from bitwright.api import evaluate, generate, inspect, load, prepare, quantize
    from bitwright.commands.report import make_report
    from bitwright.commands.rotate import rotate_model
    from bitwright.planning.plan import plan

_ELSEWHERE = {
    "make_report": "bitwright.commands.report",
    "plan": "bitwright.planning.plan",
    "rotate_model": "bitwright.commands.rotate",
}


def __getattr__(name: str) -> Any:
    """Import the verbs, and torch with them, only when they are first used."""
    if name in __all__:
        return getattr(import_module(_ELSEWHERE.get(name, "bitwright.api")), name)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
