"""A device that is not the CPU, on any machine: its tensors compute like the CPU's, but apart.

torch lets the key "privateuseone" be a backend written in Python. A tensor here holds a CPU tensor
that operations unwrap. An operation that mixes it with a CPU tensor, or asks for its memory, is
refused as CUDA would refuse it. What runs here therefore moves its tensors as a GPU needs it; that
it is fast there, or that CUDA's kernels agree, this cannot say.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
INDEXES = {"aten::index", "aten::index_put", "aten::index_put_"}  # take indices from the CPU
BETWEEN = {"aten::_to_copy", "aten::copy_"}


def install() -> torch.device:
    """Register the device in this process (once) and return it."""
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


class FarTensor(torch.Tensor):
    """A tensor on the device."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "FarTensor":
        out = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        out.here = here
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FarDevice(TorchDispatchMode):
    """Inside, tensors can also be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    away = any(isinstance(tensor, FarTensor) for tensor in tensors)
    device = kwargs.get("device")
    if device is not None:
        away = torch.device(device).type == NAME
    if away and name not in BETWEEN:
        for tensor in tensors:
            index = name in INDEXES and tensor.dtype in (torch.int64, torch.bool)
            if not isinstance(tensor, FarTensor) and tensor.dim() and not index:
                raise RuntimeError(f"{func}: a CPU tensor {list(tensor.shape)} meets {NAME}'s")
    if away and device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    out = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name.endswith("_") and not name.endswith("__"):  # in place
        return args[0]
    return tree_map(lambda leaf: _there(leaf, tensors), out) if away else out


def _here(leaf: Any) -> Any:
    return leaf.here if isinstance(leaf, FarTensor) else leaf


def _there(leaf: Any, arguments: list[torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    for argument in arguments:  # an output that is an argument stays that tensor
        if _here(argument) is leaf:
            return argument
    return FarTensor(leaf)
