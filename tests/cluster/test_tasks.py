"""What workers do, in this process: no Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import VOCABULARY
from torch import nn

from bitwright.api import prepare
from bitwright.cluster import tasks
from bitwright.cluster.ray_engine import FLOPS, worthwhile_shares
from bitwright.cluster.wire import pack, placed, unpack
from bitwright.errors import BadCheckpoint
from bitwright.pipeline.block import merge_observed
from bitwright.pipeline.calibrate import HiddenStates
from bitwright.pipeline.checkpoint import open_checkpoint
from bitwright.pipeline.topology import load_outside
from bitwright.schemes.stats import InputStats


def test_statistics_of_shares_are_those_of_all_batches(llama: Path, tmp_path: Path) -> None:
    prepared = prepare(llama, method="gptq", scheme="W8A8-INT8", activations="static")
    load_outside(prepared.topology, prepared.source)
    hidden = HiddenStates(
        prepared.topology, torch.randint(VOCABULARY, (150, 64)), tmp_path / "hidden"
    )
    held = [(where, batch) for where, batch, _ in hidden.batches(0)]
    assert len(held) == hidden.count == 5
    job = tasks.Job("a", prepared.source, prepared.plan, torch.float32, hidden.tokens)
    calls = hidden.calls(0)

    def observed(share: tasks.Held) -> Any:
        return tasks.observe_share(job, 0, share, calls, None)[0]

    whole = observed(held)
    parts = merge_observed(
        merge_observed(observed(held[:2]), observed(held[2:3])), observed(held[3:])
    )
    assert parts.stats.keys() == whole.stats.keys()
    for group, expected in whole.stats.items():
        found = parts.stats[group]
        assert found.tokens == expected.tokens == hidden.tokens
        torch.testing.assert_close(found.hessian_II, expected.hessian_II, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.absmean_I, expected.absmean_I)
        for exact in ("absmax_I", "batch_absmax_BI", "sample_TI"):
            assert torch.equal(getattr(found, exact), getattr(expected, exact))


def test_a_worker_reads_the_shards_of_its_block_alone(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    sharded = tmp_path / "sharded"
    from bitwright.api import resolve
    from bitwright.pipeline.writer import CheckpointWriter

    source = resolve(llama)
    writer = CheckpointWriter(sharded, overwrite=False)
    for part in ("layers.0", "layers.1", ""):
        names = [n for n in source.tensors if part in n and (part or "layers" not in n)]
        writer.write_shard(source.read(names))
    writer.write_json("config.json", source.config)
    writer.commit()
    prepared = prepare(sharded, scheme="W8A16")
    job = tasks.Job("b", prepared.source, prepared.plan, torch.float32, 0, url=f"file://{sharded}")
    solved, rows = tasks.solve_share(job, 1, None, None, None, None, (0, 1))
    assert len(solved.codes) == len(rows) == 7
    staged = next((tmp_path / "cache" / "staged").iterdir())
    assert [path.name for path in staged.glob("*.safetensors")] == [
        "model-00002-of-00003.safetensors"
    ]


def test_as_many_shares_as_are_worthwhile() -> None:
    with torch.device("meta"):
        linears = {
            "a.q": nn.Linear(4096, 4096), "a.o": nn.Linear(4096, 4096),
            "m.up": nn.Linear(4096, 11008), "m.down": nn.Linear(11008, 4096),
        }  # fmt: skip
    tokens = 128 * 2048
    assert worthwhile_shares(linears, tokens, FLOPS["cpu"], 16) == 16
    assert worthwhile_shares(linears, tokens, FLOPS["cuda"], 16) == 1
    assert worthwhile_shares(linears, tokens, 4e12, 64) in (16, 32)  # 43 s alone, 1.2 s per merge


def test_a_folder_that_a_worker_does_not_see_is_named(llama: Path, tmp_path: Path) -> None:
    prepared = prepare(llama, scheme="W8A16")
    elsewhere = open_checkpoint(llama)
    object.__setattr__(elsewhere, "folder", tmp_path / "gone")
    job = tasks.Job("c", elsewhere, prepared.plan, torch.float32, 0)
    with pytest.raises(BadCheckpoint, match=r"a worker does not see .*gone"):
        tasks.solve_share(job, 0, None, None, None, None, (0, 1))


def test_tensors_travel_as_their_own_bytes() -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    stats = InputStats(whole[:2], whole[0].to(torch.bfloat16), torch.tensor(2.0), tokens=3)
    value = {"a": [stats, (1, "b", None)], "empty": torch.empty(0, 3, dtype=torch.uint8)}
    packed = pack(value)
    assert packed["a"][0].hessian_II.data.nbytes == 2 * 6 * 4
    back = unpack(packed)
    assert torch.equal(back["a"][0].hessian_II, whole[:2])
    assert back["a"][0].absmean_I.dtype == torch.bfloat16
    assert back["a"][0].absmax_I.shape == ()
    assert back["a"][1] == (1, "b", None)
    assert back["empty"].shape == (0, 3)
    back["a"][0].hessian_II.zero_()
    assert whole[0, 1] == 1
    assert placed(back, "cpu", torch.float64)["a"][0].absmax_I.dtype == torch.float64
