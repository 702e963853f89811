"""Folds: found in every architecture by running it, and exact."""

from pathlib import Path

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import ARCHITECTURES, distance

from bitwright.api import load, quantize
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.folds import Fold, apply_fold, find_folds
from bitwright.pipeline.inputs import SharedInput, shared_inputs
from bitwright.pipeline.topology import (
    BlockCall,
    Topology,
    call_block,
    discover,
    load_outside,
    materialize,
    run_until_blocks,
)

GATED = {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
EXPECTED = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma3": GATED,
    "phi3": {("qkv_proj",), ("gate_up_proj",)},
    "opt": {("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)},
    "gpt-neox": {("query_key_value",), ("dense_h_to_4h",)},
}


def opened(folder: Path) -> tuple[Topology, torch.Tensor, BlockCall, list[SharedInput]]:
    """The last block of a model with its weights, and what it is called with."""
    checkpoint = open_checkpoint(folder)
    topology = discover(checkpoint)
    load_outside(topology, checkpoint)
    with torch.no_grad():
        hidden, calls = run_until_blocks(topology, torch.arange(24).view(2, 12))
    index = len(topology.block_names) - 1
    names = topology.block_tensors(index)
    tensors = checkpoint.read(names.values())
    materialize(topology.model, {p: tensors[t] for p, t in names.items()}, torch.float32)
    shared = shared_inputs(topology.block(index), topology.linears[index], hidden, calls[index])
    return topology, hidden, calls[index], shared


def folds_of(folder: Path) -> tuple[Topology, torch.Tensor, BlockCall, list[Fold]]:
    topology, hidden, call, shared = opened(folder)
    index = len(topology.block_names) - 1
    found = find_folds(topology.block(index), topology.linears[index], shared, hidden, call)
    return topology, hidden, call, found


@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_fold_of_an_architecture_is_found(architecture: str, model_of: ModelFactory) -> None:
    _, _, _, found = folds_of(model_of(architecture))
    names = {tuple(name.rpartition(".")[2] for name in fold.shared.names) for fold in found}
    assert names == EXPECTED[architecture]


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a in EXPECTED])
def test_applying_all_folds_leaves_the_block_unchanged(
    architecture: str, model_of: ModelFactory
) -> None:
    topology, hidden, call, found = folds_of(model_of(architecture))
    index = len(topology.block_names) - 1
    block, prefix = topology.block(index), topology.block_names[index] + "."
    with torch.no_grad():
        before = call_block(block, hidden, call)
    names = {p: p for p, _ in block.named_parameters(prefix=prefix[:-1])}
    names |= {p.removeprefix(prefix): p for p in names}
    values = {p: v.detach().clone() for p, v in block.named_parameters(prefix=prefix[:-1])}
    generator = torch.Generator().manual_seed(0)
    for fold in found:
        channels = int(fold.channel_I.max()) + 1
        scale_I = (torch.rand(channels, generator=generator) + 0.5)[fold.channel_I]
        applied_I = apply_fold(fold, names, values, scale_I)
        torch.testing.assert_close(applied_I, scale_I, rtol=2e-2, atol=0)
    materialize(topology.model, values, torch.float32)
    with torch.no_grad():
        after = call_block(block, hidden, call)
    assert distance(after, before) < 1e-5


def test_a_value_read_by_two_producers_is_not_folded(model_of: ModelFactory) -> None:
    """In GPT-NeoX both the attention and the MLP end in the residual: nothing precedes them."""
    _, _, _, found = folds_of(model_of("gpt-neox"))
    readers = {name.rpartition(".")[2] for fold in found for name in fold.shared.names}
    assert not readers & {"dense", "dense_4h_to_h"}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "opt", "qwen2"])
def test_folding_at_eight_bits_keeps_the_model(
    architecture: str, model_of: ModelFactory, text: Path, tmp_path: Path
) -> None:
    source, tokens, distances = model_of(architecture), torch.arange(48).view(2, 24), []
    with torch.no_grad():
        expected = load(source)[0](input_ids=tokens).logits.float()
    for method in ("gptq", "awq+gptq"):
        quantize(
            source, tmp_path / method, scheme="W8A16", group_size=32, method=method,
            calibration=str(text), samples=8, sequence_length=32,
        )  # fmt: skip
        with torch.no_grad():
            actual = load(tmp_path / method)[0](input_ids=tokens).logits.float()
        distances.append(distance(actual, expected))
    assert distances[1] < 0.1
    assert distances[1] < 2 * distances[0]
