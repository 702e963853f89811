"""What a worker does: one step of one block, over a share of the batches or of the Linears.

A task depends on the checkpoint's files and its arguments alone and changes nothing, so it can be
repeated anywhere. Nothing here knows Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numba
import torch
from torch import Tensor

from bitwright.cluster.wire import pack, placed, unpack
from bitwright.errors import BadCheckpoint
from bitwright.pipeline.block import (
    ChosenFold,
    Observed,
    Work,
    advance_quantized,
    choose_folds,
    load_block,
    merge_observed,
    observe,
    solve,
    with_cache_scales,
)
from bitwright.pipeline.cache_scales import Seen
from bitwright.pipeline.calibrate import Batch
from bitwright.pipeline.checkpoint import Checkpoint
from bitwright.pipeline.memory import peak_rss_bytes, return_freed_memory
from bitwright.pipeline.report import LayerReport
from bitwright.pipeline.solved import SolvedBlock
from bitwright.pipeline.topology import BlockCall, discover, release
from bitwright.runtime.store import stage
from bitwright.schemes.plan import Plan

Held = list[tuple[slice, Tensor]]
Calls = Mapping[int, BlockCall]


@dataclass(frozen=True)
class Job:
    """What every task of a run is given; equal if of one run.

    ``url``: where a worker gets the shards that it needs, None if ``source`` is a folder that all
    machines see. ``dtype`` and ``device``: how and where blocks are replayed. ``tokens``: how many
    there are in all batches together.
    """

    key: str
    source: Checkpoint = field(compare=False)
    plan: Plan = field(compare=False)
    dtype: torch.dtype = field(compare=False)
    tokens: int = field(compare=False)
    device: str = field(compare=False, default="cpu")
    threads: int = field(compare=False, default=1)
    url: str | None = field(compare=False, default=None)
    trust_remote_code: bool = field(compare=False, default=False)


class HeldStates:
    """A share of the hidden states, in memory; see `calibrate.States`."""

    def __init__(self, job: Job, held: Held, calls: Calls) -> None:
        self.tokens = job.tokens
        self.outputs: Held = []
        self._job, self._held = job, held
        self._calls = placed(dict(calls), job.device, job.dtype)

    def batches(self, index: int) -> Iterator[Batch]:
        """Every batch, moved to where the block is."""
        for where, batch in self._held:
            moved = placed(batch, self._job.device, self._job.dtype)
            yield where, moved, self._calls[len(batch)]

    def put(self, where: slice, hidden_BTD: Tensor) -> None:
        """Keep an output, as wide as the input was."""
        self.outputs.append((where, hidden_BTD.to(device="cpu", dtype=self._held[0][1].dtype)))

    def turn(self) -> None:
        """Nothing: outputs are another task's inputs."""


def run(step: Any, job: Job, *arguments: Any) -> Any:
    """One step in a worker process. Returns (result..., peak memory in bytes) packed."""
    torch.set_num_threads(job.threads)
    numba.set_num_threads(min(job.threads, numba.config.NUMBA_NUM_THREADS))
    with torch.no_grad():
        results = step(job, *unpack(arguments))
    return (*(pack(each) for each in results), peak_rss_bytes())


def observe_share(
    job: Job, index: int, held: Held, calls: Calls, true_held: Held | None
) -> tuple[Observed, Held, Held]:
    """(what was observed, outputs where blocks are independent, the original model's outputs)."""
    states = HeldStates(job, held, calls)
    true = None if true_held is None else HeldStates(job, true_held, calls)
    with _loaded(job, index, job.device) as work:
        observed = observe(work, index, states, true, next(states.batches(index)))
    return placed(observed, "cpu"), states.outputs, [] if true is None else true.outputs


def merge_shares(job: Job, a: Observed, b: Observed) -> tuple[Observed]:
    """What was observed in two shares."""
    return (merge_observed(a, b),)


def choose_block_folds(
    job: Job, index: int, observed: Observed, held: Held, calls: Calls
) -> tuple[list[ChosenFold]]:
    """The input scales of a block."""
    with _loaded(job, index, "cpu") as work:
        first = _first(job, held, calls)
        return (choose_folds(work, index, _tensors(job, index), observed, first),)


def solve_share(
    job: Job, index: int, observed: Observed | None, held: Held | None, calls: Calls | None,
    folds: Sequence[ChosenFold] | None, share: tuple[int, int],
) -> tuple[SolvedBlock, list[LayerReport]]:  # fmt: skip
    """A share of a block's Linears."""
    if observed is None or held is None or calls is None:
        return solve(_work(job), index, _tensors(job, index), None, None, share=share)
    with _loaded(job, index, "cpu") as work:
        first, tensors = _first(job, held, calls), _tensors(job, index)
        seen = observed.seen
        solved, rows = solve(work, index, tensors, observed, first, folds=folds, share=share)
        return with_cache_scales(work, index, solved, seen), rows


def advance_share(
    job: Job, index: int, held: Held, calls: Calls, *solved: SolvedBlock
) -> tuple[Held, dict[str, Seen]]:
    """(outputs of the quantized block, keys and values seen)."""
    states = HeldStates(job, held, calls)
    with _loaded(job, index, job.device) as work:
        seen = advance_quantized(work, index, states, placed(joined(solved), job.device))
    return states.outputs, placed(seen, "cpu")


def joined(parts: Sequence[SolvedBlock]) -> SolvedBlock:
    """One block of its shares."""
    whole = SolvedBlock({}, {})
    for part in parts:
        whole.codes.update(part.codes)
        whole.changed.update(part.changed)
        whole.cache.update(part.cache)
    return whole


def _first(job: Job, held: Held, calls: Calls) -> Batch:
    where, batch = held[0]
    moved = placed(dict(calls), "cpu", job.dtype)
    return where, batch.to(job.dtype), moved[len(batch)]


@contextmanager
def _loaded(job: Job, index: int, device: str) -> Iterator[Work]:
    work = _work(job)
    block = load_block(work, index, _tensors(job, index)).to(device)
    try:
        yield work
    finally:
        release(block)
        return_freed_memory()


@lru_cache(maxsize=1)
def _work(job: Job) -> Work:
    """The weightless model, built once by every process."""
    source = _reachable(job, [])
    topology = discover(source, trust_remote_code=job.trust_remote_code)
    return Work(source, topology, job.plan, job.dtype)


@lru_cache(maxsize=1)
def _tensors(job: Job, index: int) -> dict[str, Tensor]:
    """A block's tensors, read from its own shards; tasks of one block often follow each other."""
    names = list(_work(job).topology.block_tensors(index).values())
    return _reachable(job, names).read(names)


def _reachable(job: Job, names: Sequence[str]) -> Checkpoint:
    """The checkpoint as this machine can read it, with the shards of ``names`` at least."""
    source = job.source
    if job.url is not None:
        folder = stage(job.url, {source.tensors[name].file for name in names})
        return replace(source, folder=folder)
    if not source.folder.is_dir():
        raise BadCheckpoint(
            f"a worker does not see {source.folder}: put the model on a filesystem that all "
            "machines share, or name it by a URL"
        )
    return source
