"""Holds signals back during cleanup, so that they neither interrupt it nor get lost.

Python prints an exception that a signal handler raises inside a finaliser ("Exception ignored in ...") and drops it.
An iterator abandoned by `break` is cleaned up in its finaliser.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import TypeVar

T = TypeVar("T")
_KEPT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def held() -> Iterator[None]:
    """Delay SIGINT (Ctrl-C), SIGTERM and SIGHUP until the block ends, for those that have a Python handler."""
    caught: list[int] = []
    try:
        with _recording(caught):
            yield
    finally:
        for number in dict.fromkeys(caught):  # Ctrl-C pressed twice counts once
            signal.raise_signal(number)


class Closing(Iterator[T]):
    """Iterates over a generator and protects its `finally` blocks from signals when the iterator is dropped.

    `close()` closes the generator. Otherwise it is closed when the last reference goes away; a signal that arrives
    during this is handled as soon as the caller continues.
    """

    def __init__(self, results: Generator[T, None, None]) -> None:
        self._results = results

    def __next__(self) -> T:
        return next(self._results)

    def close(self) -> None:
        """Close the generator; nothing more is yielded."""
        self._results.close()

    def __del__(self) -> None:
        if self._results.gi_frame is not None:  # pyright: ignore[reportAttributeAccessIssue]  (generator objects have it)
            close_in_finaliser(self.close, Closing.__del__.__code__)


def close_in_finaliser(close: Callable[[], None], finaliser: CodeType) -> None:
    """Call close(); signals that arrive meanwhile are sent again after the calling finaliser has returned."""
    caught: list[int] = []
    with _recording(caught):
        close()
    if caught:
        threading.Thread(target=_send_again, args=(threading.get_ident(), finaliser, caught), daemon=True).start()


@contextmanager
def _recording(caught: list[int]) -> Iterator[None]:
    """Record signals instead of handling them. Does nothing outside the main thread, where no handler ever runs."""
    with ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            for number in _KEPT:
                before = signal.getsignal(number)
                if callable(before):  # not SIG_IGN, not SIG_DFL, not a handler installed from C
                    restored.callback(signal.signal, number, before)
                    signal.signal(number, lambda n, _: caught.append(n))
        yield


def _send_again(thread: int, finaliser: CodeType, caught: list[int]) -> None:
    while _runs(sys._current_frames().get(thread), finaliser):
        time.sleep(1e-3)
    for number in dict.fromkeys(caught):
        signal.pthread_kill(thread, number)


def _runs(frame: FrameType | None, code: CodeType) -> bool:
    """Whether the frame or one of its callers runs this code."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
