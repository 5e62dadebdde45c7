"""Signals that would be lost, or leave work half done, kept until an exception can reach who should get it.

What a signal's handler raises inside a finaliser, Python prints ("Exception ignored in ...") and forgets. An iterator
that ends since the loop over it was left (`break`) ends in its finaliser.
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
    """SIGINT (Ctrl-C), SIGTERM and SIGHUP count when the block is left, where Python code answers them."""
    caught: list[int] = []
    try:
        with _recording(caught):
            yield
    finally:
        for number in dict.fromkeys(caught):  # pressed twice, it is one request
            signal.raise_signal(number)


class Closing(Iterator[T]):
    """What a generator gives, whose `finally` signals do not cut short when nobody wants the rest.

    `close()` is the generator's. Without it the rest is given up when the last reference goes; a signal that comes
    meanwhile is answered as soon as the caller goes on.
    """

    def __init__(self, results: Generator[T, None, None]) -> None:
        self._results = results

    def __next__(self) -> T:
        return next(self._results)

    def close(self) -> None:
        """End what works for the iterator; it gives no more."""
        self._results.close()

    def __del__(self) -> None:
        if self._results.gi_frame is not None:  # pyright: ignore[reportAttributeAccessIssue]  (generator functions give it)
            close_in_finaliser(self.close, Closing.__del__.__code__)


def close_in_finaliser(close: Callable[[], None], finaliser: CodeType) -> None:
    """close(); a signal that comes meanwhile is sent again once the finaliser, which calls this, has returned."""
    caught: list[int] = []
    with _recording(caught):
        close()
    if caught:
        threading.Thread(target=_send_again, args=(threading.get_ident(), finaliser, caught), daemon=True).start()


@contextmanager
def _recording(caught: list[int]) -> Iterator[None]:
    """Signals are noted, not answered. Only the main thread has handlers; what they raise never reaches another."""
    with ExitStack() as restored:
        if threading.current_thread() is threading.main_thread():
            for number in _KEPT:
                before = signal.getsignal(number)
                if callable(before):  # neither ignored, nor the end of the process, nor somebody's C code
                    restored.callback(signal.signal, number, before)
                    signal.signal(number, lambda n, _: caught.append(n))
        yield


def _send_again(thread: int, finaliser: CodeType, caught: list[int]) -> None:
    while _runs(sys._current_frames().get(thread), finaliser):
        time.sleep(1e-3)
    for number in dict.fromkeys(caught):
        signal.pthread_kill(thread, number)


def _runs(frame: FrameType | None, code: CodeType) -> bool:
    """Whether a frame, or one that it was called from, runs this code."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
