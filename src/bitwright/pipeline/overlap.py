"""Disk work beside the computation: one thread reads the next item, one writes the last.

Both hold one item at most, so memory is bounded; without ``beside`` they do the same in turn.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


class _Beside:
    """One thread, ended with the ``with`` block; what it was doing is finished first."""

    def __init__(self, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if beside else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class ReadAhead(_Beside, Generic[Item, Value]):
    """``read`` of each item in turn, the next one while the caller works with the last."""

    def __init__(
        self, read: Callable[[Item], Value], items: Iterable[Item], *, beside: bool
    ) -> None:
        super().__init__(beside)
        self._read = read
        self._items = iter(items)
        self._next: Future[Value] | None = None
        self._begin()

    def take(self) -> Value:
        """The next value; errors of reading it are raised here. It is not kept."""
        if self._pool is None:
            return self._read(next(self._items))
        if self._next is None:
            raise StopIteration
        value, self._next = self._next.result(), None
        self._begin()
        return value

    def _begin(self) -> None:
        if self._pool is not None:
            for item in self._items:
                self._next = self._pool.submit(self._read, item)
                return


class WriteBehind(_Beside):
    """Writes in the order given, each begun once the one before is done."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__(beside)
        self._last: Future[None] | None = None

    def begin(self, write: Callable[[], None]) -> None:
        """Start ``write`` after the one before; raises what that one raised."""
        self.wait()
        if self._pool is None:
            write()
        else:
            self._last = self._pool.submit(write)

    def wait(self) -> None:
        """Until everything is written; raises what the last write raised."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
