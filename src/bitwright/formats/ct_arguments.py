"""Spec <-> the QuantizationArgs of the compressed-tensors package."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from bitwright.errors import BadCheckpoint
from bitwright.numerics.grids import E2M1, E4M3, E8M0, Grid, IntGrid
from bitwright.numerics.groups import PER_CHANNEL, PER_TENSOR, Group, per_group
from bitwright.schemes.scheme import Spec


def arguments_of(spec: Spec, *, activation: bool = False) -> Any:
    """The QuantizationArgs that say what ``spec`` says."""
    from compressed_tensors.quantization import QuantizationArgs

    integer = isinstance(spec.grid, IntGrid)
    dynamic: bool | str = activation and spec.mode == "dynamic"
    if activation and spec.two_level:
        dynamic = "local"
    fields: dict[str, Any] = {}
    if spec.scale == E4M3:
        fields["scale_dtype"] = torch.float8_e4m3fn
    elif spec.scale == E8M0:
        fields["scale_dtype"] = torch.uint8
    return QuantizationArgs(
        num_bits=spec.grid.bits,
        type="int" if integer else "float",
        symmetric=not spec.asymmetric,
        dynamic=dynamic,
        **_strategy(spec, activation),
        **fields,
    )


def _strategy(spec: Spec, activation: bool) -> dict[str, Any]:
    rows, cols = spec.group
    if spec.group == PER_TENSOR:
        return {"strategy": "tensor"}
    if rows == 1 and cols == -1:
        return {"strategy": "token" if activation else "channel"}
    if rows == 1:
        return {"strategy": "tensor_group" if spec.two_level else "group", "group_size": cols}
    return {"strategy": "block", "block_structure": [rows, cols]}


def cache_arguments_of(specs: Iterable[Spec | None]) -> Any:
    """The kv_cache_scheme of a model whose layers all have the same cache; None for 16 bits."""
    spec = next((spec for spec in specs if spec is not None), None)
    if spec is None or spec.mode == "dynamic" or spec.group == PER_TENSOR:
        return None if spec is None else arguments_of(spec, activation=True)
    arguments = arguments_of(replace(spec, group=PER_TENSOR), activation=True)
    return arguments.model_copy(update={"strategy": "attn_head"})


def cache_spec_of(arguments: Any) -> Spec:
    """Inverse of `cache_arguments_of`: static scales are float32, run-time ones bfloat16."""
    return spec_of(arguments, torch.bfloat16 if arguments.dynamic else torch.float32)


def spec_of(arguments: Any, scale: torch.dtype = torch.bfloat16) -> Spec:
    """The Spec of a QuantizationArgs; ``scale`` is the dtype scales are stored in.

    Raises BadCheckpoint for what no Spec says.
    """
    bits, kind = int(arguments.num_bits), str(getattr(arguments.type, "value", arguments.type))
    strategy = str(getattr(arguments.strategy, "value", arguments.strategy))
    symmetric = bool(arguments.symmetric)
    grid: Grid
    if kind == "int":
        if not 2 <= bits <= 8:
            raise BadCheckpoint(f"quantization_config asks for INT{bits}: 2 to 8 can be read")
        grid = IntGrid(bits, signed=symmetric)
    elif bits in (4, 8):
        grid = E4M3 if bits == 8 else E2M1
    else:
        raise BadCheckpoint(f"quantization_config asks for FP{bits}: 4 and 8 can be read")
    stored: torch.dtype | Grid = scale
    if strategy == "tensor_group":
        stored = E4M3
    elif "uint8" in str(arguments.scale_dtype):
        stored = E8M0
    return Spec(
        grid,
        _group(strategy, arguments),
        scale=stored,
        asymmetric=not symmetric,
        two_level=strategy == "tensor_group",
        mode="dynamic" if arguments.dynamic else "static",
    )


def _group(strategy: str, arguments: Any) -> Group:
    if strategy == "tensor":
        return PER_TENSOR
    if strategy in ("channel", "token", "attn_head"):
        return PER_CHANNEL
    if strategy in ("group", "tensor_group"):
        return per_group(int(arguments.group_size))
    if strategy == "block":
        rows, cols = (int(side) for side in arguments.block_structure)
        return (rows, cols)
    raise BadCheckpoint(f"quantization_config uses the strategy {strategy!r}, which is not read")
