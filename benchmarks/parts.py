"""Where the pipeline's time goes: self time of its functions, by probes put in from outside."""

from __future__ import annotations

import importlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# What is timed, wherever in bitwright it is called from: (module, attribute, part of the table).
# Time is counted for the innermost part only.
PROBES = (
    ("bitwright.pipeline.checkpoint", "Checkpoint.read", "read"),
    ("bitwright.pipeline.writer", "CheckpointWriter.write_shard", "write"),
    ("bitwright.formats.compressed_tensors", "CompressedTensors.encode", "pack"),
    ("bitwright.pipeline.topology", "call_block", "forward"),
    ("torch.nn.functional", "scaled_dot_product_attention", "attention"),
    ("bitwright.pipeline.gram", "add_gram", "gram"),
    ("bitwright.pipeline.calibrate", "_Sums.add", "channel sums"),
    ("bitwright.methods.rtn", "choose_scales", "scale search"),
    ("bitwright.numerics.linalg", "damped", "factor"),
    ("bitwright.numerics.linalg", "inverse_cholesky_upper", "factor"),
    ("bitwright.numerics.compiled", "solve_columns", "columns"),
    ("bitwright.methods.gptq", "gptq", "solve, rest"),
    ("bitwright.pipeline.folds", "find_folds", "find folds"),
    ("bitwright.methods.awq", "awq_scale", "awq search"),
    ("bitwright.methods.smoothquant", "smoothquant_scale", "smooth search"),
    ("bitwright.methods.objective", "row_errors", "error report"),
    ("bitwright.schemes.quantized", "dequantize", "dequantize"),
    ("bitwright.pipeline.topology", "materialize", "put weights"),
    ("bitwright.pipeline.inputs", "shared_inputs", "shared inputs"),
    ("bitwright.pipeline.memory", "return_freed_memory", "free memory"),
)


class Parts:
    """Self time of every probed function, summed by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """``function``, with its time less that of probed functions inside added to ``part``."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                total = time.perf_counter() - start
                self.seconds[part] += total - self._inner.pop()
                if self._inner:
                    self._inner[-1] += total

        return wrapper

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Patch every probe that exists; those that do not are named on screen."""
        undo, missing = [], []
        for module_name, path, part in PROBES:
            *owners, leaf = path.split(".")
            try:
                owner: Any = importlib.import_module(module_name)
                for name in owners:
                    owner = getattr(owner, name)
                original = getattr(owner, leaf)
            except (ImportError, AttributeError):
                missing.append(path)
                continue
            modules = [m for name, m in sys.modules.items() if name.startswith("bitwright")]
            for user in [owner, *(m for m in modules if vars(m).get(leaf) is original)]:
                setattr(user, leaf, self.timed(original, part))
                undo.append((user, leaf, original))
        if missing:
            print(f"not found, counted under other: {', '.join(missing)}", flush=True)
        try:
            yield
        finally:
            for owner, leaf, original in reversed(undo):
                setattr(owner, leaf, original)
