"""Makes what is needed next in a background thread, while the caller works with what it took last."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class OneAhead(Generic[K, V]):
    """A context in which at most one value is made ahead. When it ends, nothing runs any more.

    Args:
        make: key -> value. One thread calls it, for one key at a time. That is another thread than the caller's, so it
            must draw no random numbers: their order would follow the clock.
        background: False makes each value in the caller's thread when it is taken.
    """

    def __init__(self, make: Callable[[K], V], *, background: bool) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead") if background else None
        self._begun: tuple[K, Future[V]] | None = None

    def __enter__(self) -> OneAhead[K, V]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def take(self, key: K, then: K | None = None) -> V:
        """The value of `key`. Begins to make that of `then`; the next call throws it away if it takes another key.

        Raises:
            Exception: what `make` raised for `key`.
        """
        if self._thread is None:
            return self._make(key)
        value = self._future(self._thread, key).result()
        if then is not None:
            self._begun = then, self._thread.submit(self._make, then)
        return value

    def _future(self, thread: ThreadPoolExecutor, key: K) -> Future[V]:
        """The value that was begun, if it is that of `key`; else a new one."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == key:
            return begun[1]
        if begun is not None:
            begun[1].cancel()
        return thread.submit(self._make, key)
