"""Which Linears of a block receive the very same tensor: they share statistics and a solve."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.pipeline.experts import every_expert
from bitwright.pipeline.topology import BlockCall, call_block


@dataclass(frozen=True)
class SharedInput:
    """Names of Linears fed by one tensor, in the order they are called."""

    names: tuple[str, ...]


def shared_inputs(
    block: nn.Module, linears: Mapping[str, nn.Linear], hidden_BTD: Tensor, call: BlockCall
) -> list[SharedInput]:
    """Run the block once and group its Linears by the identity of the tensor they are given."""
    groups: list[tuple[Tensor, list[str]]] = []

    def watch(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for tensor, names in groups:
                if tensor is args[0]:
                    names.append(name)
                    return
            groups.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(watch(n)) for n, m in linears.items()]  # type: ignore[arg-type]
    try:
        with torch.no_grad(), every_expert(block):
            call_block(block, hidden_BTD, call)
    finally:
        for handle in handles:
            handle.remove()
    return [SharedInput(tuple(dict.fromkeys(names))) for _, names in groups]
