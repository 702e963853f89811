"""Blocks solved by a Ray cluster: this process reads, writes and commits, workers compute.

Where blocks are independent (no calibration, or calibration on the original model's inputs), whole
blocks are solved at the same time. Otherwise one block after the other is shared out: batches while
it is replayed, Linears while they are solved. Ray repeats a task whose worker is lost; a task
changes nothing, so the result is the same bytes. How many shares there are is settled at the start,
and all that results depend on it is the order in which statistics are summed.
"""

import math
import socket
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray import exceptions
from torch import nn

from bitwright.cluster import tasks
from bitwright.cluster.wire import pack, unpack
from bitwright.errors import BitwrightError, ClusterError
from bitwright.methods.compose import parse_method
from bitwright.pipeline.block import Work, with_cache_scales
from bitwright.pipeline.budget import peak_bytes
from bitwright.pipeline.cache_scales import Seen, merge_seen
from bitwright.pipeline.calibrate import HiddenStates
from bitwright.pipeline.run import Finished, Progress
from bitwright.pipeline.topology import stored_in_bfloat16

RETRIES = 5
FLOPS = {"cpu": 5e10, "cuda": 4e14}  # a second, about what a core or a GPU replays with
MERGED = 5e8  # bytes of statistics a second, about what a core merges
Ref = Any  # a result of Ray's, here or still to come
Started = Any  # tasks of one block


@dataclass(frozen=True)
class RayEngine:
    """See `run.Engine`.

    ``address``: "local" starts Ray on this machine, "auto" finds the cluster that this machine
    belongs to, else HOST:PORT. ``device``: "cuda" replays blocks on GPUs, one for a worker.
    ``cpus``: processor cores of a worker. ``url``: where workers get the model's shards from, if
    not from the folder that this process reads.
    """

    address: str = "local"
    device: str = "cpu"
    cpus: int = 1
    url: str | None = None
    trust_remote_code: bool = False

    def __call__(
        self,
        work: Work,
        hidden: HiddenStates | None,
        true: HiddenStates | None,
        indices: range,
        progress: Progress,
    ) -> Iterator[Finished]:
        """The blocks, in order. Raises ClusterError."""
        if not indices:
            return
        with _connected(self.address), _errors_told():
            crew = Crew(self, work, hidden, progress)
            if hidden is None:
                yield from _rolling(crew, indices, crew.solve_alone, crew.finished)
            elif work.independent:
                yield from _independent(crew, hidden, indices)
            else:
                for index in indices:
                    yield _sequential(crew, index, hidden, true)


class Crew:
    """The workers of one run: ``size`` of them, as many as the cluster holds at once."""

    def __init__(
        self, engine: RayEngine, work: Work, hidden: HiddenStates | None, progress: Progress
    ) -> None:
        """Raises ClusterError if there is no room for a single worker."""
        gpus, memory = (
            int(engine.device == "cuda"),
            peak_bytes(work.source, work.topology, work.plan, overlap=False),
        )
        self.takes = {"num_cpus": engine.cpus, "memory": memory, "max_retries": RETRIES}
        self.gpus, self.work, self.peak = gpus, work, 0
        self._count, self._progress = len(work.topology.block_names), progress
        self.size = 0
        for node in ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            room = [has.get("CPU", 0) // engine.cpus, has.get("memory", 0) // memory]
            self.size += int(min([*room, *([has.get("GPU", 0)] if gpus else [])]))
        if self.size == 0:
            raise ClusterError(
                f"no machine of the Ray cluster has what one task may need: {engine.cpus} CPU(s), "
                f"{memory / 2**30:.2f} GiB of memory" + " and a GPU" * gpus
            )
        tokens = 0 if hidden is None else hidden.tokens
        flops = FLOPS[engine.device] * (1 if gpus else engine.cpus)
        self.worthwhile = worthwhile_shares(work.topology.linears[0], tokens, flops, self.size)
        self._job = ray.put(
            tasks.Job(
                uuid.uuid4().hex,
                work.source,
                work.plan,
                torch.bfloat16 if gpus and stored_in_bfloat16(work.source) else work.dtype,
                tokens,
                engine.device,
                engine.cpus,
                engine.url,
                engine.trust_remote_code,
            )
        )

    def start(self, step: Callable[..., Any], *arguments: Any, results: int = 1) -> list[Ref]:
        """A task: references to its results and, last, to its peak memory in bytes."""
        gpu = self.gpus if step in (tasks.observe_share, tasks.advance_share) else 0
        options = self.takes | {"num_gpus": gpu, "num_returns": results + 1, "name": step.__name__}
        refs: list[Ref] = (
            ray.remote(tasks.run).options(**options).remote(step, self._job, *arguments)
        )
        return refs

    def wait(self, index: int, what: str, started: Sequence[list[Ref]]) -> None:
        """Until all tasks are done, saying how many are."""
        left = [refs[-1] for refs in started]
        while left:
            done = f"{what} {len(started) - len(left)}/{len(started)}"
            peak = f", peak {self.peak / 1e6:.0f} MB" if self.peak else ""
            note = f"block {index + 1} of {self._count}, {done} by {self.size} workers{peak}"
            self._progress(index, self._count, note)
            finished, left = ray.wait(left, timeout=1.0)
            self.peak = max([self.peak, *ray.get(finished)])

    def solve_alone(self, index: int) -> list[list[Ref]]:
        """A whole block from its weights alone."""
        return [self.start(tasks.solve_share, index, None, None, None, None, (0, 1), results=2)]

    def finished(self, index: int, solving: Sequence[list[Ref]]) -> Finished:
        """The block that was solved in shares."""
        self.wait(index, "solved", solving)
        parts, rows = zip(*((_get(codes), _get(rows)) for codes, rows, _ in solving), strict=True)
        return Finished(tasks.joined(parts), [row for each in rows for row in each], self.peak)

    def observe(
        self, index: int, held: Sequence[Ref], calls: Ref, true_held: Sequence[Ref | None]
    ) -> tuple[list[list[Ref]], Ref]:
        """Replay a block over all shares: the tasks, and what they observed together."""
        observing = [
            self.start(tasks.observe_share, index, share, calls, true, results=3)
            for share, true in zip(held, true_held, strict=True)
        ]
        level = [refs[0] for refs in observing]
        while len(level) > 1:  # pairwise: no machine receives more than two at a time
            odd = level[len(level) // 2 * 2 :]
            pairs = zip(level[::2], level[1::2], strict=False)
            level = [self.start(tasks.merge_shares, *pair)[0] for pair in pairs] + odd
        return observing, level[0]

    def shares(self, states: HiddenStates, index: int) -> list[Ref]:
        """The hidden states, cut into as many shares as are worthwhile and have a batch."""
        number = min(self.worthwhile, states.count)
        out: list[Ref] = []
        share: tasks.Held = []
        for seen, (where, batch, _) in enumerate(states.batches(index), 1):
            share.append((where, batch))
            if seen == (len(out) + 1) * states.count // number:
                out.append(_put(share))
                share = []
        return out


def worthwhile_shares(
    linears: Mapping[str, nn.Linear], tokens: int, flops: float, workers: int
) -> int:
    """Into how many shares the batches go: more are replayed sooner, their statistics merged later.

    ``linears``: those of a block; ``flops``: floating-point operations a second of a worker.
    """
    inputs = {(name.rpartition(".")[0], each.in_features) for name, each in linears.items()}
    squares = sum(width**2 for _, width in inputs)
    replay = tokens * (4 * sum(each.weight.numel() for each in linears.values()) + squares) / flops
    merge = 4 * squares / MERGED

    def seconds(shares: int) -> float:
        return replay / shares + math.ceil(math.log2(shares)) * merge

    return min(range(1, workers + 1), key=seconds)


def _rolling(
    crew: Crew,
    indices: range,
    start: Callable[[int], Started],
    finish: Callable[[int, Started], Finished],
) -> Iterator[Finished]:
    """About as many blocks at a time as there are workers, handed over in order."""
    waiting: deque[tuple[int, Started]] = deque()
    for index in indices:
        waiting.append((index, start(index)))
        if len(waiting) > crew.size:
            yield finish(*waiting.popleft())
    while waiting:
        yield finish(*waiting.popleft())


def _independent(crew: Crew, hidden: HiddenStates, indices: range) -> Iterator[Finished]:
    """The original model is replayed share by share; behind it whole blocks are solved."""
    held = crew.shares(hidden, indices.start)

    def start(index: int) -> tuple[list[Ref], list[Ref]]:
        calls = _put(hidden.calls(index))
        observing, observed = crew.observe(index, held, calls, [None] * len(held))
        arguments = (index, observed, held[0], calls, None, (0, 1))
        held[:] = [refs[1] for refs in observing]
        return crew.start(tasks.solve_share, *arguments, results=2), list(held)

    def finish(index: int, started: tuple[list[Ref], list[Ref]]) -> Finished:
        done = crew.finished(index, started[:1])
        _keep(hidden, started[1])
        return done

    yield from _rolling(crew, indices, start, finish)


def _sequential(
    crew: Crew, index: int, hidden: HiddenStates, true: HiddenStates | None
) -> Finished:
    """One block, calibrated behind the quantized ones before it."""
    calls, held = _put(hidden.calls(index)), crew.shares(hidden, index)
    true_held = [None] * len(held) if true is None else crew.shares(true, index)
    observing, observed = crew.observe(index, held, calls, true_held)
    crew.wait(index, "replayed", observing)
    folds = None
    if parse_method(crew.work.plan.method).fold is not None:
        folding = crew.start(tasks.choose_block_folds, index, observed, held[0], calls)
        crew.wait(index, "folded", [folding])
        folds = folding[0]
    number = min(crew.size, len(crew.work.topology.linears[index]))
    arguments = (index, observed, held[0], calls, folds)
    solving = [
        crew.start(tasks.solve_share, *arguments, (share, number), results=2)
        for share in range(number)
    ]
    done = crew.finished(index, solving)
    codes = [refs[0] for refs in solving]
    advancing = [
        crew.start(tasks.advance_share, index, share, calls, *codes, results=2) for share in held
    ]
    crew.wait(index, "advanced", advancing)
    _keep(hidden, [refs[0] for refs in advancing])
    if true is not None:
        _keep(true, [refs[2] for refs in observing])
    seen: dict[str, Seen] = {}
    for refs in advancing:
        for name, one in _get(refs[1]).items():
            seen[name] = merge_seen(seen[name], one) if name in seen else one
    return replace(done, solved=with_cache_scales(crew.work, index, done.solved, seen))


def _keep(states: HiddenStates, outputs: Sequence[Ref]) -> None:
    """Make what a block put out, share by share, the current states."""
    for ref in outputs:
        for where, batch in _get(ref):
            states.put(where, batch)
    states.turn()


def _put(value: Any) -> Ref:
    return ray.put(pack(value))


def _get(ref: Ref) -> Any:
    return unpack(ray.get(ref))


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """A connection to Ray, ended afterwards unless this process had it. Raises ClusterError."""
    if ray.is_initialized():
        yield
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        if host:  # Ray itself would try for a minute
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at --address {address}: {_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _errors_told() -> Iterator[None]:
    """Errors of workers as bitwright's own."""
    try:
        yield
    except exceptions.RayError as error:
        cause: BaseException = error
        while isinstance(cause, exceptions.RayTaskError):
            cause = cause.cause
        if isinstance(cause, BitwrightError):
            raise cause from None
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(cause):
            raise ClusterError(f"a worker ran out of memory: {_line(cause)}") from error
        if not isinstance(cause, exceptions.RayError):
            raise  # a fault of bitwright's
        raise ClusterError(  # workers or machines lost, or stopped for their memory, too often
            f"the cluster could not finish ({type(cause).__name__}: {_line(cause)}); finished "
            "blocks are kept: --resume goes on behind them"
        ) from error


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
