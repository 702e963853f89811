"""Reading ahead and writing behind: in order, one item at a time, and no error is lost."""

import threading
from pathlib import Path
from typing import Any

import pytest

from bitwright.api import execute, prepare
from bitwright.errors import NoSpace
from bitwright.pipeline.calibrate import HiddenStates
from bitwright.pipeline.overlap import ReadAhead, WriteBehind
from bitwright.pipeline.writer import CheckpointWriter


@pytest.mark.parametrize("beside", [False, True])
def test_items_come_in_order_and_only_one_is_read_ahead(beside: bool) -> None:
    begun: list[int] = []
    ready = threading.Event()

    def read(item: int) -> int:
        begun.append(item)
        if item == 1:
            ready.set()
        return item * item

    with ReadAhead(read, range(4), beside=beside) as squares:
        assert squares.take() == 0
        if beside:
            assert ready.wait(10)  # item 1 is read although nobody asked for it yet
        assert begun == ([0, 1] if beside else [0])
        assert [squares.take() for _ in range(3)] == [1, 4, 9]


def test_an_error_of_reading_is_raised_when_its_turn_comes() -> None:
    def read(item: int) -> int:
        if item == 1:
            raise NoSpace("item 1")
        return item

    with ReadAhead(read, range(3), beside=True) as items:
        assert items.take() == 0
        with pytest.raises(NoSpace, match="item 1"):
            items.take()


def test_an_error_of_writing_is_raised_by_the_next_step_and_once() -> None:
    done: list[int] = []

    def fail() -> None:
        raise NoSpace("full")

    with WriteBehind(beside=True) as disk:
        disk.begin(fail)
        with pytest.raises(NoSpace, match="full"):
            disk.begin(lambda: done.append(1))
        assert not done
        disk.begin(lambda: done.append(2))
        disk.wait()
    assert done == [2]


def test_what_was_begun_is_finished_when_the_work_is_interrupted() -> None:
    begun, go, done = threading.Event(), threading.Event(), list[int]()

    def write() -> None:
        begun.set()
        assert go.wait(10)
        done.append(1)

    def interrupted() -> None:
        with WriteBehind(beside=True) as disk:
            disk.begin(write)
            assert begun.wait(10)
            threading.Timer(0.05, go.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_states_are_not_overwritten_before_the_block_they_began_is_on_the_disk(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk: every put of a block has to wait for the shard of the block before."""
    written: list[int] = []
    puts: list[int] = []
    real_write, real_put = CheckpointWriter.write_shard, HiddenStates.put

    def slow(self: CheckpointWriter, tensors: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            threading.Event().wait(0.5)
            written.append(len(written))
        real_write(self, tensors)

    def put(self: HiddenStates, where: slice, hidden_BTD: Any) -> None:
        real_put(self, where, hidden_BTD)
        puts.append(len(written))

    monkeypatch.setattr(CheckpointWriter, "write_shard", slow)
    monkeypatch.setattr(HiddenStates, "put", put)
    prepared = prepare(
        llama, method="gptq", group_size=32, calibration=str(text), samples=4, sequence_length=32
    )
    execute(prepared, tmp_path / "out")
    assert written == [0, 1]
    assert set(puts) == {0, 1}  # of block 0 with nothing written, of block 1 after block 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_result_is_the_same_without(
    method: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    import dataclasses

    prepared = prepare(
        llama, method=method, group_size=32, samples=4, sequence_length=32,
        calibration=str(text) if method == "gptq" else None,
    )  # fmt: skip
    assert prepared.overlap
    for name, overlap in (("with", True), ("without", False)):
        execute(dataclasses.replace(prepared, overlap=overlap), tmp_path / name)
    for path in (tmp_path / "with").iterdir():
        assert path.read_bytes() == (tmp_path / "without" / path.name).read_bytes()


def test_a_limit_that_only_fits_without_is_kept_without(llama: Path) -> None:
    with_overlap = prepare(llama).prediction.memory_bytes
    tight = prepare(llama, memory=str(with_overlap - 1))
    assert not tight.overlap
    assert tight.prediction.memory_bytes < with_overlap
    assert prepare(llama, memory=str(with_overlap)).overlap
