"""Replaying blocks gives what the whole model computes, and the statistics of its inputs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.fixtures import ModelFactory
from support.models import ARCHITECTURES, VOCABULARY
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.errors import NoSpace, UnsupportedModel
from bitwright.pipeline import calibrate
from bitwright.pipeline.calibrate import HiddenStates, advance, collect
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.gram import add_gram, by_tiles, mirror
from bitwright.pipeline.inputs import SharedInput
from bitwright.pipeline.topology import discover, load_outside, materialize


@pytest.mark.parametrize("batch_tokens", [32, 80, 4096])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_equals_the_model(
    architecture: str,
    batch_tokens: int,
    model_of: ModelFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_PER_BATCH", batch_tokens)
    folder = model_of(architecture)
    tokens = torch.randint(VOCABULARY, (5, 32))
    source = open_checkpoint(folder)
    topology = discover(source)
    load_outside(topology, source)
    hidden = HiddenStates(topology, tokens, tmp_path / "hidden")
    assert hidden.tokens == tokens.numel()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    name = next(iter(topology.linears[1]))
    seen: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    last = model.get_submodule(topology.block_names[1])
    last.register_forward_hook(
        lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)

    for index in range(2):
        block = topology.block(index)
        names = topology.block_tensors(index)
        loaded = source.read(names.values())
        materialize(topology.model, {p: loaded[t] for p, t in names.items()}, torch.float32)
        if index == 1:
            group = SharedInput((name,))
            stats = collect(block, topology.linears[1], [group], hidden, 1)[group]
            x = seen[0].reshape(-1, seen[0].shape[-1])
            torch.testing.assert_close(stats.hessian_II, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.absmean_I, x.abs().mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.absmax_I, x.abs().amax(0), rtol=1e-4, atol=1e-5)
            assert stats.tokens == tokens.numel()
        advance(block, hidden, index)
    replayed = torch.cat([batch for _, batch, _ in hidden.batches(1)])
    torch.testing.assert_close(replayed, outputs[0], rtol=1e-4, atol=1e-4)
    del replayed
    hidden.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("twice", [False, True])
def test_batches_end_when_every_input_was_seen(
    twice: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "TOKENS_PER_BATCH", 32)
    source = open_checkpoint(llama)
    topology = discover(source)
    load_outside(topology, source)
    hidden = HiddenStates(topology, torch.randint(VOCABULARY, (4, 32)), tmp_path / "hidden")
    block, linears, names = topology.block(0), topology.linears[0], topology.block_tensors(0)
    loaded = source.read(names.values())
    materialize(topology.model, {p: loaded[t] for p, t in names.items()}, torch.float32)
    groups = [SharedInput((name,)) for name in linears]
    last = linears[list(linears)[-1]]
    if twice:  # a Linear that a block calls again: what it reads then counts as well
        block.register_forward_pre_hook(lambda _, args: linears[groups[0].names[0]](args[0]))
    ends: list[int] = []
    last.register_forward_hook(lambda *_: ends.append(1))
    stopped = collect(block, linears, groups, hidden, 0)
    assert len(ends) == (4 if twice else 1)
    whole = collect(block, linears, groups, hidden, 0, on_output=lambda where, out: None)
    assert len(ends) == (8 if twice else 5)
    for group in groups:
        assert torch.equal(stopped[group].hessian_II, whole[group].hessian_II)
        assert stopped[group].tokens == whole[group].tokens


@pytest.mark.parametrize("add", [add_gram, by_tiles])
@pytest.mark.parametrize("width", [1, 30, 255, 256, 301])
@pytest.mark.parametrize("tokens", [1, 63, 1200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_matrix_product(
    add: Callable[[Tensor, Tensor], None], width: int, tokens: int, dtype: torch.dtype
) -> None:
    x = torch.randn(tokens, width).to(dtype)
    more = torch.randn(width, tokens).to(dtype).T  # rows are no neighbours
    before = torch.get_float32_matmul_precision()
    gram = torch.zeros(width, width)
    add(gram, x)
    add(gram, more)
    mirror(gram)
    assert torch.get_float32_matmul_precision() == before
    both = torch.cat([x, more]).double()
    expected = (both.T @ both).float()
    torch.testing.assert_close(gram, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(gram, gram.T)


def test_calls_that_depend_on_the_tokens_are_refused() -> None:
    from bitwright.pipeline.calibrate import _require_same
    from bitwright.pipeline.topology import BlockCall

    a = [BlockCall((), {"mask": torch.zeros(3), "pair": (torch.ones(1), None)})]
    same = [BlockCall((), {"mask": torch.zeros(3), "pair": (torch.ones(1), None)})]
    _require_same(a, same)
    for other in (
        {"mask": torch.ones(3), "pair": (torch.ones(1), None)},
        {"mask": torch.zeros(3), "pair": (torch.zeros(1), None)},
        {"mask": torch.zeros(3)},
    ):
        with pytest.raises(UnsupportedModel, match="depends on the tokens"):
            _require_same(a, [BlockCall((), other)])


def test_reserving_more_than_the_disk_has_is_refused(tmp_path: Path) -> None:
    import sys

    if sys.platform != "linux":
        pytest.skip("NOT TESTED: only Linux reserves disk blocks")
    with pytest.raises(NoSpace, match="fewer samples"):
        calibrate._reserve(tmp_path / "hidden", 1 << 60)
