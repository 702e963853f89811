"""Hadamard transforms that run with the model: recorded in config.json, installed as hooks.

A rotated checkpoint is not the model it looks like until its online transforms run: the input
of each named Linear is multiplied by a block-diagonal Hadamard, H / sqrt(block) per block. The
record is our own key in config.json; a quantized checkpoint says the same in the terms of the
compressed-tensors package (``transform_config``) when the blocks are powers of two.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.errors import BadCheckpoint
from bitwright.numerics.hadamard import has_hadamard, power_of_two_in, times_hadamard

KEY = "bitwright_transforms"


@dataclass(frozen=True)
class OnlineHadamard:
    """The inputs of ``layers`` (module names) are rotated in blocks of ``block`` channels."""

    block: int
    layers: tuple[str, ...]


def online_hadamards(config: Mapping[str, Any]) -> list[OnlineHadamard]:
    """What a checkpoint's config.json asks to be run. Raises BadCheckpoint."""
    record = config.get(KEY)
    if record is None:
        return []
    try:
        found = [OnlineHadamard(int(e["block"]), tuple(e["layers"])) for e in record["online"]]
    except (KeyError, TypeError, ValueError):
        raise BadCheckpoint(f"config.json has {KEY}, but not as bitwright writes it") from None
    for entry in found:
        if not has_hadamard(entry.block):
            raise BadCheckpoint(f"config.json asks for a Hadamard transform of {entry.block}")
    return found


def record(online: list[OnlineHadamard], **about: Any) -> dict[str, Any]:
    """The value of our key: the transforms to run, and how the weights were rotated."""
    return {"online": [{"block": e.block, "layers": list(e.layers)} for e in online], **about}


def install_online(model: nn.Module, config: Mapping[str, Any]) -> int:
    """Make ``model`` rotate what its checkpoint's config asks for; how many Linears do.

    Hooks run in the order they are registered: install before anything that observes or rounds
    the inputs. Raises BadCheckpoint for a layer that the model does not have.
    """
    count = 0
    for entry in online_hadamards(config):
        for name in entry.layers:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise BadCheckpoint(f"config.json rotates {name}, which does not exist") from None
            module.register_forward_pre_hook(rotating_hook(entry.block))
            count += 1
    return count


def rotating_hook(block: int) -> Callable[..., tuple[Any, ...]]:
    """A forward pre-hook that rotates the first argument, computed in float32."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        return (times_hadamard(x.float(), block).to(x.dtype), *args[1:])

    return hook


def transform_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same record as a compressed-tensors ``transform_config``.

    None if there is nothing to run, or if a block is no power of two, which the package's own
    "hadamard" transform cannot express.
    """
    from compressed_tensors.transform import TransformArgs, TransformConfig, TransformScheme

    online = online_hadamards(config)
    if not online or any(power_of_two_in(entry.block) != entry.block for entry in online):
        return None
    groups = {
        f"R4_{index}" if index else "R4": TransformScheme(
            type="hadamard",
            head_dim=entry.block,
            apply=[TransformArgs(targets=list(entry.layers), location="input")],
        )
        for index, entry in enumerate(online)
    }
    out: dict[str, Any] = TransformConfig(config_groups=groups).model_dump(mode="json")
    return out
