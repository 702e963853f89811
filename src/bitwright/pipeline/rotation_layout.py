"""Where a block can be rotated: found by running it, no table of architectures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.errors import UnsupportedModel
from bitwright.methods.rotate import (
    Rotation,
    absorb_gain,
    full_or_blocks,
    head_rotation,
    online_rotation,
    reading,
    rotate,
    writing,
)
from bitwright.numerics.hadamard import has_hadamard, power_of_two_in
from bitwright.pipeline.online import OnlineHadamard
from bitwright.pipeline.topology import BlockCall, Topology, call_block, materialize

TOLERANCE = 1e-4
Blocks = Literal["power of two", "full"]
Rule = Literal["no gain", "gain", "gain plus one"]
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Norm:
    """A norm whose output feeds ``readers``; ``parameter`` is its gain, "" if it has none."""

    name: str
    parameter: str
    rule: Rule
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Heads:
    """Linear ``value`` is mixed over tokens, head by head, and read by ``output``."""

    value: str
    output: str
    size: int

    def renamed(self, old: str, new: str) -> "Heads":
        """The same place in another block."""
        value, output = self.value.removeprefix(old), self.output.removeprefix(old)
        return Heads(new + value, new + output, self.size)


@dataclass(frozen=True)
class Layout:
    """Where the block ``prefix`` is rotated; names of modules, except for gains."""

    prefix: str
    norms: tuple[Norm, ...]
    writers: tuple[str, ...]
    heads: tuple[Heads, ...]
    online: tuple[OnlineHadamard, ...]


def rotated_block(
    layout: Layout, tensors: Mapping[str, Tensor], rotation: Rotation, seed: int
) -> dict[str, Tensor]:
    """A block's parameters in the rotated basis; float64 in and out."""
    out = dict(tensors)
    for heads in layout.heads:
        rotate_heads(heads, out, seed)
    for entry in layout.online:
        for key in (f"{name}.weight" for name in entry.layers):
            out[key] = reading(out[key], online_rotation(out[key].shape[1], entry.block))
    for norm in layout.norms:
        rotate_readers(norm, out, rotation)
    for name in layout.writers:
        for parameter in (f"{name}.weight", f"{name}.bias"):
            if parameter in out:
                out[parameter] = writing(out[parameter], rotation)
    return out


def rotate_heads(heads: Heads, out: dict[str, Tensor], seed: int) -> None:
    """Rotate what v puts out and o reads, head by head."""
    for name, change, side in ((heads.value, writing, 0), (heads.output, reading, 1)):
        for key in (f"{name}.weight", f"{name}.bias") if side == 0 else (f"{name}.weight",):
            if key in out:
                turn = head_rotation(out[key].shape[side], heads.size, seed + 1)
                out[key] = change(out[key], turn)


def rotate_readers(norm: Norm, out: dict[str, Tensor], rotation: Rotation) -> None:
    """Move a norm's gain into its readers and rotate what they read."""
    for reader in norm.readers:
        weight = out[f"{reader}.weight"]
        if norm.parameter:
            gain = out[norm.parameter]
            weight = absorb_gain(weight, gain if norm.rule == "gain" else gain + 1)
        out[f"{reader}.weight"] = reading(weight, rotation)
    if norm.parameter:
        out[norm.parameter] = torch.full_like(out[norm.parameter], neutral_gain(norm))


def neutral_gain(norm: Norm) -> float:
    """The gain that leaves a norm's output as it is."""
    return 0.0 if norm.rule == "gain plus one" else 1.0


def find_layout(
    topology: Topology,
    index: int,
    tensors: Mapping[str, Tensor],
    rotation: Rotation,
    hidden: Tensor,
    call: BlockCall,
    seed: int,
    before: Layout | None,
    *,
    heads: bool,
    online: bool,
    blocks: Blocks,
) -> Layout:
    """What of block ``index`` can be rotated, and how; leaves ``tensors`` in the block, float32.

    ``hidden``, ``call``: the block's input and arguments. ``before``: the layout of another
    block, whose head sizes are tried first. Raises UnsupportedModel for norms that are not RMS.
    """
    block, prefix = topology.block(index), topology.block_names[index]
    linears = topology.linears[index]
    materialize(topology.model, tensors, torch.float32)

    def run() -> Tensor:
        return call_block(block, hidden, call)

    norms = find_norms(block, prefix, linears, rotation, run)
    readers = [name for norm in norms for name in norm.readers]
    writers = tuple(
        name for name, m in linears.items()
        if name not in readers and m.out_features == rotation.width
    )  # fmt: skip
    found: list[Heads] = []
    if heads:
        if before is not None:
            found = [h.renamed(before.prefix, prefix) for h in before.heads]
        if before is None or not _keeps(topology, tensors, found, run, seed):
            found = []
            for writer in writers:
                found += _heads(topology, tensors, linears, readers, writer, run, seed)
    rest = [name for name in writers if name not in [h.output for h in found]]
    transforms = []
    for name in rest if online else []:
        width = linears[name].in_features
        size = power_of_two_in(width) if blocks == "power of two" else full_or_blocks(width)
        transforms.append(OnlineHadamard(size, (name,)))
    return Layout(prefix, tuple(norms), writers, tuple(found), tuple(transforms))


def find_norms(
    module: nn.Module, prefix: str, linears: Mapping[str, nn.Linear], rotation: Rotation, run: Run
) -> list[Norm]:
    """The RMS norms of a module that feed Linears. Raises UnsupportedModel for other norms."""
    outputs: list[tuple[Tensor, str]] = []
    fed: dict[str, list[str]] = {}

    def note_output(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if isinstance(output, Tensor) and output.shape[-1] == rotation.width:
                outputs.append((output, name))

        return hook

    def note_input(linear: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            for tensor, name in outputs:
                same = tensor.data_ptr() == args[0].data_ptr()
                if same and tensor.numel() == args[0].numel():
                    fed.setdefault(name, []).append(linear)
                    return

        return hook

    handles = [
        m.register_forward_hook(note_output(name))
        for name, m in module.named_modules()
        if name and not isinstance(m, (nn.Linear, nn.Embedding))
    ]
    handles += [m.register_forward_pre_hook(note_input(name)) for name, m in linears.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    norms = []
    for name, names in fed.items():
        full = f"{prefix}.{name}" if prefix else name
        rule = _rule(module.get_submodule(name), full, rotation)
        if rule is not None:
            parameter = next((f"{full}.{p}" for p, _ in _gains(module.get_submodule(name))), "")
            norms.append(Norm(full, parameter, rule, tuple(dict.fromkeys(names))))
    return norms


def _gains(norm: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(norm.named_parameters(recurse=False))


def _rule(norm: nn.Module, name: str, rotation: Rotation) -> Rule | None:
    """How a norm uses its gain; None for a module that is no norm and has no parameters."""
    width = rotation.width
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, width, generator=generator) * 3 + 1
    gains = _gains(norm)
    if not gains:
        is_norm = next(norm.parameters(), None) is None and _commutes(norm, x, rotation)
        return "no gain" if is_norm else None
    leaf, gain = gains[0]
    if len(gains) == 1 and gain.shape == (width,):
        expected = norm(x)
        rules: tuple[tuple[Rule, float], ...] = (("gain", 1.0), ("gain plus one", 0.0))
        for rule, neutral in rules:
            setattr(norm, leaf, nn.Parameter(torch.full_like(gain, neutral), requires_grad=False))
            try:
                actual = norm(x) * (gain + (1 - neutral))
                if difference(actual, expected) < TOLERANCE and _commutes(norm, x, rotation):
                    return rule
            finally:
                setattr(norm, leaf, gain)
    raise UnsupportedModel(
        f"{name} ({type(norm).__name__}) is not a plain RMS norm (it subtracts the mean, adds a "
        "bias or does more): the residual stream cannot be rotated; quantize without rotations"
    )


def _commutes(norm: nn.Module, x: Tensor, rotation: Rotation) -> bool:
    return difference(norm(rotate(x, rotation)), rotate(norm(x), rotation)) < TOLERANCE


def _heads(
    topology: Topology,
    tensors: Mapping[str, Tensor],
    linears: Mapping[str, nn.Linear],
    readers: Sequence[str],
    output: str,
    run: Run,
    seed: int,
) -> list[Heads]:
    """The v of an o and the size of their heads: the largest rotation that changes nothing."""
    width = linears[output].in_features
    for value in reversed(readers):
        rows = linears[value].out_features
        sizes = (h for h in range(rows, 7, -1) if rows % h == 0 and has_hadamard(h))
        for size in sizes if width % rows == 0 else ():
            heads = [Heads(value, output, size)]
            if _keeps(topology, tensors, heads, run, seed):
                return heads
    return []


def _keeps(
    topology: Topology, tensors: Mapping[str, Tensor], heads: list[Heads], run: Run, seed: int
) -> bool:
    """Whether rotating these heads leaves the block's function as it is."""
    if any(f"{name}.weight" not in tensors for h in heads for name in (h.value, h.output)):
        return False
    expected = run()
    out = dict(tensors)
    for one in heads:
        rotate_heads(one, out, seed)
    changed = [name for name in out if out[name] is not tensors[name]]
    materialize(topology.model, {n: out[n] for n in changed}, torch.float32)
    actual = run()
    materialize(topology.model, {n: tensors[n] for n in changed}, torch.float32)
    return difference(actual, expected) < TOLERANCE


def difference(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|."""
    return float((actual - expected).norm() / expected.norm())
