"""Where an input scale can be folded away: found by running the block, proved by running it.

A shared input x may be replaced by x / s if the Linears reading it take columns times s and
whatever produces x divides its channels by s. Candidates for the producer come from the run
(the module whose output *is* x, and Linears of the block with a matching number of outputs);
one is accepted only if the block, with a random s applied, still computes the same function.
No table of architectures.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.pipeline.inputs import SharedInput
from bitwright.pipeline.topology import BlockCall, call_block

TOLERANCE = 1e-5
Rule = Literal["gain", "gain plus one", "rows"]


@dataclass(frozen=True, eq=False)
class Fold:
    """A proved place for an input scale.

    ``producer``: parameter names, relative to the block, whose channels are divided by s:
    a norm's gain (and bias), a norm that multiplies by 1 + gain, or the rows of a Linear.
    ``channel_I``: int64, the producer's channel that each column of the consumers reads.
    """

    shared: SharedInput
    producer: tuple[str, ...]
    rule: Rule
    channel_I: Tensor


def find_folds(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    shared: Sequence[SharedInput],
    hidden_BTD: Tensor,
    call: BlockCall,
) -> list[Fold]:
    """Every shared input of the block that has a provable producer. Weights must be loaded.

    Runs the block in float32 on a few tokens and restores it.
    """
    folds = []
    hidden = hidden_BTD[:1].float()
    call = _trim(call)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _float32(block):
        made_by = _producers(block, linears, shared, hidden, call)
        expected = call_block(block, hidden, call)
        for group in shared:
            for fold in _candidates(block, linears, group, made_by.get(group)):
                with _applied(block, linears, fold, generator):
                    actual = call_block(block, hidden, call)
                if float((actual - expected).norm() / expected.norm()) < TOLERANCE:
                    folds.append(fold)
                    break
    return folds


def apply_fold(
    fold: Fold, names: Mapping[str, str], tensors: dict[str, Tensor], scale_I: Tensor
) -> Tensor:
    """Fold s into a block's float32 tensors, in place; returns the s really applied.

    ``names``: parameter name relative to the block -> key in ``tensors``, which also hold the
    consumers' weights under their module names + ".weight". Gains are kept at the bfloat16
    precision they are stored in, and s is adjusted to what that rounding makes of it, so the
    fold is exact.
    """
    channels = int(fold.channel_I.max()) + 1
    scale_C = torch.ones(channels, device=scale_I.device)
    scale_C[fold.channel_I] = scale_I
    if fold.rule != "rows":
        gain = tensors[names[fold.producer[0]]]
        offset = 1.0 if fold.rule == "gain plus one" else 0.0
        stored = ((gain + offset) / scale_C - offset).to(torch.bfloat16).float()
        exact_C = (gain + offset) / (stored + offset)
        usable = torch.isfinite(exact_C) & (exact_C > 0)
        scale_C = torch.where(usable, exact_C, torch.ones_like(scale_C))
    for parameter in fold.producer:
        tensors[names[parameter]] = _divided(tensors[names[parameter]], scale_C, fold.rule)
    applied_I = scale_C[fold.channel_I]
    for name in fold.shared.names:
        tensors[names[name + ".weight"]] = tensors[names[name + ".weight"]] * applied_I
    return applied_I


def _divided(value: Tensor, scale_C: Tensor, rule: Rule) -> Tensor:
    if rule == "gain plus one":
        return (value + 1) / scale_C - 1
    return value / (scale_C if value.ndim == 1 else scale_C[:, None])


def _producers(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    shared: Sequence[SharedInput],
    hidden: Tensor,
    call: BlockCall,
) -> dict[SharedInput, str]:
    """For each shared input, the module whose output it is, if any."""
    outputs: list[tuple[Tensor, str]] = []
    made_by: dict[SharedInput, str] = {}
    first = {group.names[0]: group for group in shared}

    def note_output(name: str) -> object:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor):
                outputs.append((output, name))

        return hook

    def note_input(group: SharedInput) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for tensor, name in outputs:
                if tensor is args[0]:
                    made_by[group] = name

        return hook

    handles = [
        module.register_forward_hook(note_output(name))
        for name, module in block.named_modules()
        if name and not isinstance(module, nn.Linear)
    ]
    handles += [
        linears[name].register_forward_pre_hook(note_input(group))  # type: ignore[arg-type]
        for name, group in first.items()
    ]
    try:
        call_block(block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    return made_by


def _candidates(
    block: nn.Module, linears: Mapping[str, nn.Linear], group: SharedInput, producer: str | None
) -> Iterator[Fold]:
    width = linears[group.names[0]].in_features
    if producer is not None:
        module = block.get_submodule(producer)
        gains = tuple(
            f"{producer}.{name}"
            for name, p in module.named_parameters(recurse=False)
            if tuple(p.shape) == (width,)
        )
        if gains:
            yield Fold(group, gains, "gain", torch.arange(width))
            if len(gains) == 1:
                yield Fold(group, gains, "gain plus one", torch.arange(width))
    for name, linear in linears.items():
        if name in group.names or width % linear.out_features:
            continue
        rows = tuple(
            f"{name}.{part}"
            for part in ("weight", "bias")
            if linear._parameters.get(part) is not None
        )
        for channel_I in _layouts(linear.out_features, width):
            yield Fold(group, rows, "rows", channel_I)


def _layouts(channels: int, width: int) -> Iterator[Tensor]:
    """Ways in which ``width`` columns can read ``channels`` channels, whole heads repeated."""
    if channels == width:
        yield torch.arange(width)
        return
    repeat = width // channels
    for head in (32, 64, 80, 96, 128, 256, 8, 16):
        if channels % head == 0:
            heads = torch.arange(channels).view(-1, 1, head)
            yield heads.expand(-1, repeat, -1).reshape(-1)


@contextmanager
def _applied(
    block: nn.Module, linears: Mapping[str, nn.Linear], fold: Fold, generator: torch.Generator
) -> Iterator[None]:
    """The block with a random scale folded in, restored afterwards."""
    channels = int(fold.channel_I.max()) + 1
    scale_C = torch.rand(channels, generator=generator) * 1.5 + 0.5  # the same on every device
    scale_C = scale_C.to(linears[fold.shared.names[0]].weight.device)
    parameters = dict(block.named_parameters()) | {
        f"{name}.{part}": value
        for name, linear in linears.items()
        for part, value in linear.named_parameters()
    }
    touched: list[Tensor] = [parameters[name] for name in fold.producer]
    touched += [linears[name].weight for name in fold.shared.names]
    kept = [p.detach().clone() for p in touched]
    for name in fold.producer:
        parameters[name].copy_(_divided(parameters[name], scale_C, fold.rule))
    for name in fold.shared.names:
        linears[name].weight.mul_(scale_C[fold.channel_I])
    try:
        yield
    finally:
        for parameter, value in zip(touched, kept, strict=True):
            parameter.copy_(value)


@contextmanager
def _float32(block: nn.Module) -> Iterator[None]:
    before = dict(block.named_parameters())
    for name, p in before.items():
        owner, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(owner), leaf, nn.Parameter(p.float(), requires_grad=False))
    try:
        yield
    finally:
        for name, p in before.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, p)


def _trim(call: BlockCall) -> BlockCall:
    """The call for one sample, floating tensors as float32."""

    def one(value: object) -> object:
        if isinstance(value, Tensor):
            value = value[:1] if value.ndim > 0 else value
            return value.float() if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(one(item) for item in value)
        return value

    return BlockCall(tuple(one(a) for a in call.args), {k: one(v) for k, v in call.kwargs.items()})
