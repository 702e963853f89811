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
    "compare", "convert", "evaluate", "generate", "inspect", "load", "plan", "prepare", "quantize",
    "report", "rotate", "train", "verify",
]  # fmt: skip

if TYPE_CHECKING:
    from bitwright.api import evaluate, generate, inspect, load, prepare, quantize
    from bitwright.api_convert import convert
    from bitwright.api_train import train
    from bitwright.commands.compare import compare_schemes as compare
    from bitwright.commands.report import make_report as report
    from bitwright.commands.rotate import rotate_model as rotate
    from bitwright.evaluation.verify import verify
    from bitwright.planning.plan import plan

_ELSEWHERE = {
    "plan": ("bitwright.planning.plan", "plan"),
    "report": ("bitwright.commands.report", "make_report"),
    "compare": ("bitwright.commands.compare", "compare_schemes"),
    "convert": ("bitwright.api_convert", "convert"),
    "rotate": ("bitwright.commands.rotate", "rotate_model"),
    "train": ("bitwright.api_train", "train"),
    "verify": ("bitwright.evaluation.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    """Import the verbs, and torch with them, only when they are first used."""
    if name in __all__:
        module, inside = _ELSEWHERE.get(name, ("bitwright.api", name))
        return getattr(import_module(module), inside)
    raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
