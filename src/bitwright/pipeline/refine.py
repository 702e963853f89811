"""End-to-end refinement: tune all scales so that the model predicts what the original did."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bitwright.errors import UnsupportedModel
from bitwright.methods.tune import TunedLinear, divergence_and_gradient
from bitwright.pipeline.calibrate import HiddenStates, advance
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.topology import (
    Topology,
    compute_dtype,
    layer_name,
    load_outside,
    materialize,
    placed,
    release,
)
from bitwright.schemes.quantized import QuantizedLinear

Say = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Effort:
    """``steps`` of Adam over ``batch`` samples each, cosine decay from ``learning_rate``.

    ``held_out`` of the samples judge instead of training: every ``check_every`` steps their
    divergence is measured, the best scales are kept, and ``patience`` checks without a better
    one end the run.
    """

    steps: int
    batch: int = 2
    learning_rate: float = 2e-3
    held_out: float = 0.1
    check_every: int = 30
    patience: int = 3


@dataclass(frozen=True)
class Refinement:
    """What refinement did: mean divergence on held-out samples before and after, and when."""

    before: float
    after: float
    steps: int
    best_step: int


@torch.no_grad()
def original_outputs(
    source: Checkpoint, topology: Topology, tokens_NT: Tensor, folder: Path
) -> Tensor:
    """The original model's last hidden states for every token (N, T, D), in a mapped file."""
    load_outside(topology, source)
    hidden = HiddenStates(topology, tokens_NT, folder / "original-states.bin")
    for index in range(len(topology.block_names)):
        names = topology.block_tensors(index)
        tensors = placed(source.read(names.values()), topology)
        materialize(
            topology.model, {p: tensors[t] for p, t in names.items()}, compute_dtype(source)
        )
        advance(topology.block(index), hidden, index)
        release(topology.block(index))
    out: Tensor | None = None
    for where, batch, _ in hidden.batches(0):
        with blocks_return(topology, batch):
            last = topology.model.base_model(  # type: ignore[operator]
                input_ids=tokens_NT[where].to(topology.device), use_cache=False
            ).last_hidden_state
        if out is None:
            size = tokens_NT.numel() * last.shape[-1]
            file = str(folder / "original-outputs.bin")
            out = torch.from_file(file, shared=True, size=size, dtype=last.dtype)
            out = out.view(*tokens_NT.shape, last.shape[-1])
        out[where] = last
    hidden.close()
    assert out is not None
    return out


@torch.no_grad()
def output_factor(topology: Topology, source: Checkpoint) -> float:
    """The number c with logits = c * (last hidden state) Wᵀ, W being the output embedding.

    Raises UnsupportedModel where logits are more than that (soft-capped, biased): tuning
    computes them a few rows at a time from W alone.
    """
    outside = topology.outside()
    tensors = placed(source.view(outside.values()), topology)
    materialize(topology.model, {p: tensors[t] for p, t in outside.items()}, compute_dtype(source))
    topology.model.tie_weights()  # type: ignore[operator]
    tokens_BT = torch.arange(16, device=topology.device)[None]
    embedded = topology.model.get_input_embeddings()(tokens_BT)  # type: ignore[operator]
    with blocks_return(topology, embedded):
        logits = topology.model(input_ids=tokens_BT, use_cache=False).logits[0].float()
        hidden = topology.model.base_model(  # type: ignore[operator]
            input_ids=tokens_BT, use_cache=False
        ).last_hidden_state[0]
    weight = topology.model.get_output_embeddings().weight  # type: ignore[operator]
    plain = linear(hidden, weight).float()
    factor = float((plain * logits).sum() / plain.square().sum())
    if not (logits - factor * plain).abs().amax() <= 0.02 * logits.abs().amax():
        raise UnsupportedModel(
            f"{type(topology.model).__name__} does more to its logits than scale them, which "
            "tuning does not support: choose a method without tuning, such as awq+gptq"
        )
    return factor


def refine(
    source: Checkpoint,
    topology: Topology,
    solved: Mapping[str, QuantizedLinear],
    changed: Mapping[str, Tensor],
    tokens_NT: Tensor,
    effort: Effort,
    folder: Path,
    *,
    factor: float,
    seed: int,
    say: Say,
) -> tuple[dict[str, QuantizedLinear], Refinement]:
    """``solved`` with better scales; codes and zero points stay as they are.

    ``changed``: tensors that folding rewrote, by checkpoint name. ``factor``: see
    `output_factor`. The whole quantized model is
    in memory, codes at a byte per weight; activations are kept for one sample.
    """
    targets_NTD = original_outputs(source, topology, tokens_NT, folder)
    return_freed_memory()
    layers, output_VD = _assemble(source, topology, solved, changed)
    return_freed_memory()
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(tokens_NT), generator=generator).tolist()
    kept = max(1, round(len(shuffled) * effort.held_out))
    judges, pupils = shuffled[:kept], shuffled[kept:] or shuffled

    def divergence(sample: int, *, learn: float | None) -> float:
        tokens = tokens_NT[sample : sample + 1].to(topology.device)
        target = targets_NTD[sample].to(topology.device)
        with torch.set_grad_enabled(learn is not None):
            out = topology.model.base_model(input_ids=tokens, use_cache=False)  # type: ignore[operator]
        hidden = out.last_hidden_state[0]
        total, gradient = divergence_and_gradient(
            hidden.detach() * factor, target * factor, output_VD
        )
        if learn is not None:
            hidden.backward(gradient * (factor * learn / len(target)))
        return total / len(target)

    def judge() -> float:
        return sum(divergence(sample, learn=None) for sample in judges) / len(judges)

    parameters = [layer.log_scale_OG for layer in layers.values()]
    optimizer = torch.optim.Adam(parameters, lr=effort.learning_rate, betas=(0.9, 0.99))
    best = before = judge()
    best_step, waited, queue = 0, 0, list[int]()
    snapshot = [p.detach().clone() for p in parameters]
    for step in range(effort.steps):
        say(step, effort.steps, f"tuning scales, divergence {best:.4f}")
        rate = 0.5 * (1 + math.cos(math.pi * step / effort.steps)) * min(1.0, (step + 1) / 10)
        optimizer.param_groups[0]["lr"] = effort.learning_rate * rate
        for _ in range(effort.batch):
            if not queue:
                order = torch.randperm(len(pupils), generator=generator)
                queue = [pupils[i] for i in order]
            divergence(queue.pop(), learn=1.0 / effort.batch)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % effort.check_every == 0 or step + 1 == effort.steps:
            now = judge()
            waited = 0 if now < best else waited + 1
            if now < best:
                best, best_step = now, step + 1
                snapshot = [p.detach().clone() for p in parameters]
            if waited > effort.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, snapshot, strict=True):
            parameter.copy_(value)
    result = {name: layer.result().to(torch.device("cpu")) for name, layer in layers.items()}
    release(topology.model)
    return result, Refinement(before, best, step + 1 if effort.steps else 0, best_step)


def _assemble(
    source: Checkpoint,
    topology: Topology,
    solved: Mapping[str, QuantizedLinear],
    changed: Mapping[str, Tensor],
) -> tuple[dict[str, TunedLinear], Tensor]:
    """The quantized model in place of the empty one; returns its layers and output embedding."""
    dtype = compute_dtype(source)
    names = {p: t for p, t in topology.source.items() if t.removesuffix(".weight") not in solved}
    for parameter, tensor in names.items():
        value = changed[tensor] if tensor in changed else source.read([tensor])[tensor]
        materialize(topology.model, placed({parameter: value}, topology), dtype)
    topology.model.tie_weights()  # type: ignore[operator]
    layers: dict[str, TunedLinear] = {}
    for block in topology.linears:
        for module_name, module in block.items():
            name = layer_name(topology, module_name)
            if name in solved:
                layers[name] = TunedLinear(solved[name].to(topology.device), module.bias, dtype)
                owner, _, leaf = module_name.rpartition(".")
                setattr(topology.model.get_submodule(owner), leaf, layers[name])
    output = topology.model.get_output_embeddings()  # type: ignore[operator]
    weight = output.weight.detach()
    assert isinstance(weight, Tensor)
    return layers, weight


@contextmanager
def blocks_return(topology: Topology, hidden_BTD: Tensor) -> Iterator[None]:
    """Run only what comes before and after the blocks, given what the last of them puts out."""
    blocks: list[nn.Module] = [topology.block(i) for i in range(len(topology.block_names))]
    for block in blocks:
        block.forward = lambda *args, **kwargs: hidden_BTD
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
