"""Every Linear's estimated divergence at several bit widths, from one backward pass.

Blocks are loaded one at a time, forwards and then backwards; what each was given is kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.methods.rtn import rtn
from bitwright.methods.sensitivity import divergence_increase, sampled_gradient
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.refine import blocks_return, output_factor
from bitwright.pipeline.topology import (
    Topology,
    call_block,
    compute_dtype,
    layer_name,
    load_outside,
    materialize,
    placed,
    release,
    run_until_blocks,
)
from bitwright.schemes.quantized import dequantize
from bitwright.schemes.scheme import Spec
from bitwright.schemes.stats import InputStats

Progress = Callable[[int, int, str], None]


def sensitivities(
    source: Checkpoint,
    topology: Topology,
    tokens_NT: Tensor,
    candidates: Mapping[str, Sequence[Spec]],
    *,
    seed: int,
    progress: Progress = lambda done, total, note: None,
) -> tuple[dict[str, list[float]], list[list[str]]]:
    """(layer -> nats per token for each of its candidate specs, layers that read one input).

    ``candidates``: by layer name; weights are rounded to nearest, scales weighted by the inputs.
    ``tokens_NT``: int64, run as one batch. Raises UnsupportedModel where logits are more than
    scaled.
    """
    factor = output_factor(topology, source)
    load_outside(topology, source)
    count = len(topology.block_names)
    with torch.no_grad():
        hidden_BTD, calls = run_until_blocks(topology, tokens_NT)
        inputs = []
        for index in range(count):
            progress(index, 2 * count, "measuring how sensitive layers are")
            inputs.append(hidden_BTD)
            with _loaded(topology, source, index) as block:
                hidden_BTD = call_block(block, hidden_BTD, calls[index])
    gradient_BTD = _last_gradient(topology, tokens_NT, hidden_BTD, factor, seed)
    found: dict[str, list[float]] = {}
    together: list[list[str]] = []
    for index in reversed(range(count)):
        progress(2 * count - 1 - index, 2 * count, "measuring how sensitive layers are")
        hidden_BTD = inputs.pop().detach().requires_grad_()
        with _loaded(topology, source, index) as block, torch.enable_grad():
            readers: dict[int, tuple[Any, list[str]]] = {}
            for module_name, module in topology.linears[index].items():
                name = layer_name(topology, module_name)
                if name in candidates:
                    module.register_forward_hook(
                        _watch(name, module, candidates[name], found, readers)
                    )
            torch.autograd.backward(call_block(block, hidden_BTD, calls[index]), gradient_BTD)
            for module in topology.linears[index].values():
                module._forward_hooks.clear()
        assert hidden_BTD.grad is not None
        gradient_BTD = hidden_BTD.grad
        together = [names for _, names in readers.values()] + together
    release(topology.model)
    return found, together


@contextmanager
def _loaded(topology: Topology, source: Checkpoint, index: int) -> Iterator[nn.Module]:
    """One block with its weights."""
    names, block = topology.block_tensors(index), topology.block(index)
    tensors = placed(source.read(names.values()), topology)
    materialize(topology.model, {p: tensors[t] for p, t in names.items()}, compute_dtype(source))
    try:
        yield block
    finally:
        release(block)
        return_freed_memory()


def _last_gradient(
    topology: Topology, tokens_NT: Tensor, hidden_BTD: Tensor, factor: float, seed: int
) -> Tensor:
    """Gradient of the drawn labels' -log p by what the last block put out."""
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = hidden_BTD.detach().requires_grad_()
    output_VD = topology.model.get_output_embeddings().weight.detach() * factor  # type: ignore[operator]
    with blocks_return(topology, hidden_BTD), torch.enable_grad():
        last = topology.model.base_model(  # type: ignore[operator]
            input_ids=tokens_NT.to(topology.device), use_cache=False
        ).last_hidden_state
        flat_TD = last.detach().flatten(0, -2)
        last.backward(sampled_gradient(flat_TD, output_VD, generator).view_as(last))
    assert hidden_BTD.grad is not None
    return hidden_BTD.grad


def _watch(
    name: str,
    module: nn.Linear,
    specs: Sequence[Spec],
    found: dict[str, list[float]],
    readers: dict[int, tuple[Any, list[str]]],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """A hook that estimates one Linear once the gradient of its output is known."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        readers.setdefault(id(x), (x, []))[1].append(name)
        output.register_hook(lambda g: estimate(x.detach(), g))  # type: ignore[no-untyped-call]

    def estimate(x: Tensor, gradient: Tensor) -> None:
        x_TI, gradient_TO = x.flatten(0, -2), gradient.flatten(0, -2)
        square_I = x_TI.float().square().mean(0)
        stats = InputStats(torch.diag(square_I), square_I.sqrt(), square_I.sqrt(), tokens=len(x_TI))
        weight_OI = module.weight.detach()
        found[name] = []
        for spec in specs:
            change_OI = dequantize(rtn(weight_OI.float(), stats, spec)).sub_(weight_OI.float())
            found[name].append(
                divergence_increase(x_TI, gradient_TO, change_OI.to(weight_OI.dtype))
            )

    return hook
