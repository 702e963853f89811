"""Rewriting a checkpoint in a rotated basis, one block at a time, with proof instead of a table.

Readers of the residual stream are the Linears fed by an RMS norm (found by running the block),
writers the other Linears as wide as the stream. A norm's gain moves into its readers; then the
block, given rotated hidden states, must return the rotated output. A structure for which that
does not hold in float32 is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import UnsupportedModel
from bitwright.methods.rotate import Rotation, residual_rotation, rotate
from bitwright.pipeline.checkpoint import Checkpoint, open_checkpoint
from bitwright.pipeline.memory import return_freed_memory
from bitwright.pipeline.online import KEY, OnlineHadamard, record, rotating_hook
from bitwright.pipeline.rotation_layout import (
    TOLERANCE,
    Blocks,
    Layout,
    Norm,
    difference,
    find_layout,
    find_norms,
    neutral_gain,
    rotate_readers,
    rotated_block,
)
from bitwright.pipeline.topology import (
    BlockCall,
    Topology,
    call_block,
    materialize,
    release,
    run_until_blocks,
)
from bitwright.pipeline.writer import CheckpointWriter, require_space

ROWS = 8192


def rotate_checkpoint(
    source: Checkpoint,
    topology: Topology,
    target: Path,
    *,
    seed: int = 0,
    heads: bool = True,
    online: bool = True,
    blocks: Blocks = "power of two",
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Checkpoint:
    """Write an equivalent checkpoint into ``target``: same function, rotated weights, same dtypes.

    R1 always; R2 with ``heads``; R4 with ``online`` for every writer that has no R2, in blocks
    that compressed-tensors can express, or over the full width. Output embeddings are untied.
    config.json records the online transforms, without which the weights mean nothing. Holds one
    block, or the embeddings, in float32. Raises UnsupportedModel; ``target`` is then untouched.
    """
    require_space(target, 2 * source.nbytes)
    writer = CheckpointWriter(target, overwrite=overwrite)
    count = len(topology.block_names)
    online_layers: list[OnlineHadamard] = []
    try:
        with torch.no_grad():
            progress(0, count, "embeddings")
            rotation, hidden, calls = _rotate_ends(source, topology, writer, seed)
            found: Layout | None = None
            for index in range(count):
                progress(index, count, f"block {index + 1} of {count}")
                names = topology.block_tensors(index)
                stored = source.read(names.values())
                tensors = {p: stored[t].double() for p, t in names.items()}
                found = find_layout(
                    topology, index, tensors, rotation, hidden, calls[index], seed, found,
                    heads=heads, online=online, blocks=blocks,
                )  # fmt: skip
                after = rotated_block(found, tensors, rotation, seed)
                hidden = _prove(
                    topology, index, found, tensors, after, rotation, hidden, calls[index]
                )
                writer.write_shard({t: after[p].to(stored[t].dtype) for p, t in names.items()})
                online_layers += found.online
                release(topology.block(index))
                del stored, tensors, after
                return_freed_memory()
        about = {"seed": seed, "r1": rotation.block, "r2": [h.size for h in found.heads]}  # type: ignore[union-attr]
        config = _untied(source.config)
        config[KEY] = record(_merged(online_layers), **about)
        writer.copy_companions(source.folder)
        writer.write_json("config.json", config)
        writer.commit()
    finally:
        writer.discard()  # nothing is left to discard after a commit
    release(topology.model)
    progress(count, count, "done")
    return open_checkpoint(target)


def _prove(
    topology: Topology,
    index: int,
    layout: Layout,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    rotation: Rotation,
    hidden: Tensor,
    call: BlockCall,
) -> Tensor:
    """Run the block before and after; returns the original output. Raises UnsupportedModel."""
    block = topology.block(index)
    materialize(topology.model, before, torch.float32)
    expected = call_block(block, hidden, call)
    materialize(topology.model, after, torch.float32)
    handles = [
        topology.model.get_submodule(name).register_forward_pre_hook(rotating_hook(entry.block))
        for entry in layout.online
        for name in entry.layers
    ]
    try:
        actual = call_block(block, rotate(hidden, rotation), call)
    finally:
        for handle in handles:
            handle.remove()
    changed = difference(actual, rotate(expected, rotation))
    if not changed < TOLERANCE:
        raise UnsupportedModel(
            f"{topology.block_names[index]} ({type(block).__name__}) computes something else in a "
            f"rotated basis (relative difference {changed:.1g}): quantize without rotations"
        )
    return expected


def _rotate_ends(
    source: Checkpoint, topology: Topology, writer: CheckpointWriter, seed: int
) -> tuple[Rotation, Tensor, list[BlockCall]]:
    """Rotate and write what is outside the blocks; the rotation, and the original probe states."""
    model: Any = topology.model
    names = topology.outside()
    stored = source.read(names.values())
    materialize(model, {p: stored[t] for p, t in names.items()}, torch.float32)
    model.tie_weights()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    called = {module: name for name, module in model.named_modules()}
    if not isinstance(head, nn.Linear):
        raise UnsupportedModel(f"{type(model).__name__} has no Linear output embedding to rotate")
    rotation = residual_rotation(embedding.weight.shape[1], seed)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.weight.shape[0], (2, 12), generator=generator)
    hidden, calls = run_until_blocks(topology, tokens)
    if hidden.shape[-1] != rotation.width:
        raise UnsupportedModel(
            f"{type(model).__name__} embeds tokens in {rotation.width} channels but its blocks "
            f"work on {hidden.shape[-1]}: what lies between cannot be rotated; quantize without "
            "rotations"
        )
    head_name, embedding_weight = called[head], f"{called[embedding]}.weight"

    def run() -> Tensor:
        with _empty_blocks(topology):
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits

    expected = run()
    norms = find_norms(model, "", {head_name: head}, rotation, run)
    dtypes = {p: stored[t].dtype for p, t in names.items()}
    out = {p: stored[t] for p, t in names.items()}
    out.setdefault(f"{head_name}.weight", out[embedding_weight])
    dtypes.setdefault(f"{head_name}.weight", dtypes[embedding_weight])
    head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)  # its own from here on
    out[embedding_weight] = _by_rows(out[embedding_weight], lambda part: rotate(part, rotation))
    for norm in norms:
        _rotate_head(norm, out, rotation)
    materialize(model, out, torch.float32)
    rotated, _ = run_until_blocks(topology, tokens)
    changed = max(difference(rotated, rotate(hidden, rotation)), difference(run(), expected))
    if not changed < TOLERANCE:
        raise UnsupportedModel(
            f"{type(model).__name__} embeds its tokens or computes its logits in a way that does "
            f"not follow a rotation (relative difference {changed:.1g}): quantize without "
            "rotations"
        )
    for parameter, value in out.items():
        tensor = topology.source.get(parameter, parameter)
        writer.write_shard({tensor: value.to(dtypes[parameter])})
    inside = {t for i in range(len(calls)) for t in topology.block_tensors(i).values()}
    for tensor in sorted(set(source.tensors) - inside - set(names.values())):
        writer.write_shard(source.read([tensor]))
    release(model)
    return rotation, hidden, calls


def _rotate_head(norm: Norm, out: dict[str, Tensor], rotation: Rotation) -> None:
    """`_rotate_readers`, a few thousand rows of the output embedding at a time."""
    gains = {norm.parameter: out[norm.parameter].double()} if norm.parameter else {}
    for reader in norm.readers:
        name = f"{reader}.weight"

        def turned(part: Tensor, name: str = name) -> Tensor:
            small = gains | {name: part}
            rotate_readers(norm, small, rotation)
            return small[name]

        out[name] = _by_rows(out[name], turned)
    if norm.parameter:
        out[norm.parameter] = torch.full_like(gains[norm.parameter], neutral_gain(norm))


def _by_rows(weight_OI: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``change`` of a large weight, in float64 for some rows at a time, as float32."""
    out = torch.empty(weight_OI.shape, dtype=torch.float32)
    for start in range(0, len(weight_OI), ROWS):
        out[start : start + ROWS] = change(weight_OI[start : start + ROWS].double())
    return out


@contextmanager
def _empty_blocks(topology: Topology) -> Iterator[None]:
    """Every block returns the hidden states it is given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    blocks: list[nn.Module] = [topology.block(i) for i in range(len(topology.block_names))]
    for block in blocks:
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _merged(transforms: Sequence[OnlineHadamard]) -> list[OnlineHadamard]:
    """One entry per block size."""
    layers: dict[int, tuple[str, ...]] = {}
    for entry in transforms:
        layers[entry.block] = (*layers.get(entry.block, ()), *entry.layers)
    return [OnlineHadamard(size, names) for size, names in layers.items()]


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with an output embedding of its own."""
    out = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and "tie_word_embeddings" in value:
            out[key] = value | {"tie_word_embeddings": False}
    return out | {"tie_word_embeddings": False}
