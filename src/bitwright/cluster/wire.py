"""Values with tensors inside, as they travel between processes.

Ray hands arrays over through shared memory; a pickled tensor would carry its whole storage, once
for every view of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor's bytes."""

    data: npt.NDArray[np.uint8]
    dtype: torch.dtype
    shape: torch.Size


def pack(value: Any) -> Any:
    """``value`` with every tensor inside lists, tuples, dicts and dataclasses as `Packed`."""
    return _replaced(value, Tensor, _packed)


def unpack(value: Any) -> Any:
    """Inverse of `pack`; the tensors are copies that may be written to."""
    return _replaced(value, Packed, _unpacked)


def placed(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """``value`` with every tensor on a device, floating ones as ``dtype`` if it is given."""

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=wanted)

    return _replaced(value, Tensor, move)


def _packed(tensor: Tensor) -> Packed:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Packed(data, tensor.dtype, tensor.shape)


def _unpacked(packed: Packed) -> Tensor:
    # torch's own memory: products may round differently where the alignment is another
    own = torch.empty(packed.data.size, dtype=torch.uint8)
    own.numpy()[:] = packed.data
    return own.view(packed.dtype).reshape(packed.shape)


def _replaced(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, kind, change) for each in value)
    if type(value) is dict:
        return {key: _replaced(each, kind, change) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        return replace(value, **{k: _replaced(v, kind, change) for k, v in parts.items()})
    return value
