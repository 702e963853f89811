"""Replaying a block over the calibration tokens, and what is learned on the way."""

import copy
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from bitwright.errors import BadRequest, NoSpace, UnsupportedModel
from bitwright.pipeline.checkpoint import memory_of
from bitwright.pipeline.gram import add_gram, mirror
from bitwright.pipeline.inputs import SharedInput
from bitwright.pipeline.topology import BlockCall, Topology, call_block, run_until_blocks
from bitwright.pipeline.writer import disk
from bitwright.schemes.stats import InputStats

TOKENS_PER_BATCH = 2048
SAMPLED_TOKENS = 512


Batch = tuple[slice, Tensor, BlockCall]


class States(Protocol):
    """Hidden states that a block is replayed over, and where its outputs go."""

    @property
    def tokens(self) -> int:
        """How many tokens the statistics are of, wherever the other ones are."""
        ...

    def batches(self, index: int) -> Iterator[Batch]:
        """(where, hidden states, the call of block ``index``) for every batch."""
        ...

    def put(self, where: slice, hidden_BTD: Tensor) -> None:
        """What a block puts out for one batch; it counts from the next `turn` on."""
        ...

    def turn(self) -> None:
        """Make what was put current."""
        ...


class HiddenStates:
    """The input of the current block for every calibration sample, in files.

    Batches of whole samples; block kwargs (masks, rotary tables) are recorded once per batch
    size, after checking that they do not depend on the tokens. What a block puts out goes into a
    second file, which `turn` makes the current one: a crash in between loses nothing. The states
    before those are overwritten by it, after ``before_overwriting`` was called: it has to wait
    until nobody would go on from them. Files are read and written batch by batch, not mapped, so
    that memory never holds more than a batch.
    """

    def __init__(self, topology: Topology, tokens_NT: Tensor, file: Path, done: int = 0) -> None:
        """The embedded tokens, or after ``done`` turns what an earlier run left in the files."""
        samples, length = tokens_NT.shape
        self.batch = max(1, min(samples, TOKENS_PER_BATCH // length))
        self.before_overwriting: Callable[[], None] = lambda: None
        self._calls: dict[int, list[BlockCall]] = {}
        self._file = file
        self._turns = done
        self._shape: tuple[int, ...] = ()
        with torch.no_grad():
            for start in range(0, samples, self.batch):
                tokens = tokens_NT[start : start + self.batch]
                if done and len(tokens) in self._calls:
                    continue
                hidden, calls = run_until_blocks(topology, tokens)
                known = self._calls.setdefault(len(tokens), calls)
                _require_same(known, calls)
                if not self._shape:
                    self._shape = (samples, length, hidden.shape[-1])
                    self._dtype, self._device = hidden.dtype, hidden.device
                    self._open_files(keep=done > 0)
                if not done:
                    self._write(self._turns, start, hidden)

    def twin(self, file: Path) -> "HiddenStates":
        """A copy in files of its own, to be advanced by other weights than this one.

        After turns of an earlier run: what that run left in ``file``.
        """
        other = copy.copy(self)
        other._file = file
        other._open_files(keep=self._turns > 0)
        if not self._turns:
            for where, batch, _ in self.batches(0):
                other._write(0, where.start, batch)
        return other

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return self._shape[0] * self._shape[1]

    @property
    def count(self) -> int:
        """How many batches there are."""
        return -(-self._shape[0] // self.batch)

    def batches(self, index: int) -> Iterator[Batch]:
        """(where, hidden states, the call of block ``index``) for every batch."""
        for start in range(0, self._shape[0], self.batch):
            where = slice(start, min(start + self.batch, self._shape[0]))
            batch = torch.empty(where.stop - start, *self._shape[1:], dtype=self._dtype)
            with disk(self._file.parent), _named(self._file, self._turns % 2).open("rb") as handle:
                handle.seek(start * self._sample_bytes)
                handle.readinto(memory_of(batch))
            yield where, batch.to(self._device), self._calls[where.stop - start][index]

    def calls(self, index: int) -> dict[int, BlockCall]:
        """The call of block ``index`` by the number of samples in a batch."""
        return {samples: calls[index] for samples, calls in self._calls.items()}

    def put(self, where: slice, hidden_BTD: Tensor) -> None:
        """What a block puts out for one batch; it counts from the next `turn` on."""
        self.before_overwriting()
        self._write(self._turns + 1, where.start, hidden_BTD)

    def turn(self) -> None:
        """Make what was put current."""
        self._turns += 1

    def sync(self) -> None:
        """Have the current states on the disk."""
        with _named(self._file, self._turns % 2).open("rb") as handle:
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Delete the files."""
        for parity in (0, 1):
            _named(self._file, parity).unlink(missing_ok=True)

    @property
    def _sample_bytes(self) -> int:
        return math.prod(self._shape[1:]) * self._dtype.itemsize

    def _write(self, turn: int, start: int, hidden_BTD: Tensor) -> None:
        with disk(self._file.parent), _named(self._file, turn % 2).open("r+b") as handle:
            handle.seek(start * self._sample_bytes)
            handle.write(memory_of(hidden_BTD.cpu().contiguous()))

    def _open_files(self, *, keep: bool) -> None:
        """Reserve both files; with ``keep`` they exist already."""
        size = self._shape[0] * self._sample_bytes
        for parity in (0, 1):
            path = _named(self._file, parity)
            if not keep:
                _reserve(path, size)
            elif not path.is_file() or path.stat().st_size != size:
                raise BadRequest(
                    f"--resume: {path} is gone or damaged: start over without --resume"
                )


def _named(file: Path, parity: int) -> Path:
    return file.with_name(f"{file.name}.{parity}")


def _reserve(file: Path, size: int) -> None:
    """Give a file its place on the disk at once, not block by block until there is none left."""
    try:
        with file.open("wb") as handle:
            if sys.platform == "linux":
                os.posix_fallocate(handle.fileno(), 0, size)
            else:
                handle.truncate(size)
    except OSError as error:
        raise NoSpace(
            f"the disk of {file.parent.parent} is full: the calibration tokens need "
            f"{size / 1e6:.0f} MB there while running; free some space or give fewer samples"
        ) from error


def _require_same(known: Sequence[BlockCall], calls: Sequence[BlockCall]) -> None:
    for index, (a, b) in enumerate(zip(known, calls, strict=True)):
        for key in set(a.kwargs) | set(b.kwargs):
            if not _equal(a.kwargs.get(key), b.kwargs.get(key)):
                raise UnsupportedModel(
                    f"block {index} is called with {key!r} that depends on the tokens: its "
                    "calibration cannot be replayed block by block"
                )


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)


def advance(block: nn.Module, hidden: States, index: int) -> None:
    """Replace the stored hidden states by the block's outputs."""
    with torch.no_grad():
        for where, batch, call in hidden.batches(index):
            hidden.put(where, call_block(block, batch, call))
    hidden.turn()


def collect(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    shared: Sequence[SharedInput],
    hidden: States,
    index: int,
    on_output: Callable[[slice, Tensor], None] | None = None,
    *,
    sample: bool = False,
) -> dict[SharedInput, InputStats]:
    """Statistics of every shared input of a block that any token reached, in one replay.

    ``on_output`` receives each batch's output of the unquantized block; without it, a batch ends
    when every input was seen, before the last Linears. ``sample`` keeps what input scales are
    chosen by.
    """
    stride = max(1, hidden.tokens // SAMPLED_TOKENS) if sample else 0
    sums = {group: _Sums(stride) for group in shared}
    calls: Counter[SharedInput] = Counter()  # in this batch
    once = False  # where a Linear is called again, a batch has to run to its end

    def add(group: SharedInput, x: Tensor) -> None:
        sums[group].add(x)
        calls[group] += 1
        if once and len(calls) == len(sums):
            raise _EverythingSeen

    handles = [
        linears[group.names[0]].register_forward_pre_hook(
            lambda _, args, group=group: add(group, args[0])
        )
        for group in shared
    ]
    try:
        with torch.no_grad():
            for where, batch, call in hidden.batches(index):
                calls.clear()
                try:
                    output = call_block(block, batch, call)
                except _EverythingSeen:
                    continue
                once = on_output is None and all(calls[group] == 1 for group in sums)
                if on_output is not None:
                    on_output(where, output)
    finally:
        for handle in handles:
            handle.remove()
    return {group: total.stats() for group, total in sums.items() if total.tokens}


def collect_drift(
    block: nn.Module,
    linears: Mapping[str, nn.Linear],
    shared: Sequence[SharedInput],
    hidden: States,
    true: States,
    index: int,
) -> dict[SharedInput, Tensor]:
    """Mean over tokens of (x - x~) x~ᵀ per shared input, float32 (I, I).

    x~ is what the block's Linears read behind the quantized blocks (``hidden``), x what they
    read in the original model (``true``, which advances by this block, still unquantized).
    """
    seen: dict[SharedInput, Tensor] = {}
    sums: dict[SharedInput, Tensor] = {}

    def keep(group: SharedInput) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen.update({group: args[0].reshape(-1, args[0].shape[-1])})

    handles = [linears[group.names[0]].register_forward_pre_hook(keep(group)) for group in shared]
    try:
        with torch.no_grad():
            pairs = zip(hidden.batches(index), true.batches(index), strict=True)
            for (_, behind_BTD, call), (where, true_BTD, _) in pairs:
                call_block(block, behind_BTD, call)
                behind = dict(seen)
                true.put(where, call_block(block, true_BTD, call))
                for group, x_TI in behind.items():
                    drift_II = (seen[group].float() - x_TI.float()).T @ x_TI.float()
                    sums[group] = sums[group].add_(drift_II) if group in sums else drift_II
    finally:
        for handle in handles:
            handle.remove()
    true.turn()
    return {group: total / hidden.tokens for group, total in sums.items()}


class _EverythingSeen(Exception):
    """Leaves a block whose remaining outputs nobody needs."""


class _Sums:
    """Running sums over tokens of one shared input."""

    def __init__(self, stride: int) -> None:
        self.tokens = 0
        self.stride = stride
        self.batches: list[Tensor] = []
        self.samples: list[Tensor] = []
        self.gram: Tensor | None = None
        self.absolute: Tensor | None = None
        self.largest: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x_TI = x.reshape(-1, x.shape[-1])
        absolute_TI = x_TI.abs()
        largest = absolute_TI.amax(0)
        total = absolute_TI.sum(0, dtype=torch.float32)
        if self.gram is None or self.absolute is None or self.largest is None:
            width = x_TI.shape[1]
            self.gram = torch.zeros(width, width, dtype=torch.float32, device=x_TI.device)
            self.absolute, self.largest = total, largest
        else:
            self.absolute += total
            self.largest = torch.maximum(self.largest, largest)
        add_gram(self.gram, x_TI)
        self.tokens += x_TI.shape[0]
        if self.stride:
            self.batches.append(largest.float())
            self.samples.append(x_TI[:: self.stride].float())

    def stats(self) -> InputStats:
        assert self.gram is not None
        assert self.absolute is not None
        assert self.largest is not None
        return InputStats(
            hessian_II=mirror(self.gram.div_(self.tokens)),  # not needed any more
            absmean_I=self.absolute / self.tokens,
            absmax_I=self.largest.float(),
            tokens=self.tokens,
            batch_absmax_BI=torch.stack(self.batches) if self.stride else None,
            sample_TI=torch.cat(self.samples) if self.stride else None,
        )
