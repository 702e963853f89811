"""Quantize large language models and prove the result.

>>> import bitwright
>>> bitwright.quantize("model/", "model-W4A16/", scheme="W4A16")  # doctest: +SKIP
>>> bitwright.evaluate("model-W4A16/", reference="model/")  # doctest: +SKIP
>>> model, tokenizer = bitwright.load("model-W4A16/")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["convert", "evaluate", "generate", "inspect", "load", "prepare", "quantize", "verify"]

_WHERE = {"convert": "bitwright.api_convert", "verify": "bitwright.evaluation.verify"}

if TYPE_CHECKING:
    from bitwright.api import evaluate, generate, inspect, load, prepare, quantize
    from bitwright.api_convert import convert
    from bitwright.evaluation.verify import verify


def __getattr__(name: str) -> Any:
    """Import the verbs, and torch with them, only when they are first used."""
    if name in __all__:
        return getattr(import_module(_WHERE.get(name, "bitwright.api")), name)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
