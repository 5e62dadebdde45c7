"""Signals that end a command: one line and a fitting exit status, at any moment.

The handler does not raise, it leaves the process. An exception would be swallowed in a finaliser, printed as a
traceback while modules are imported, and interrupted itself by a second signal. Leaving at once is safe because
whatever a command writes is whole or absent, as it must be for SIGKILL too.

This is the first module that `import fastcl` loads: in the command's own process it answers signals from then on, also
while torch is imported. A process that merely uses the package keeps its own handlers. Only small modules are imported
here, since nothing answers before this one is loaded.
"""

from __future__ import annotations

import os
import select
import signal
import sys

TYPE_CHECKING = False  # typing itself takes longer to import than the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}
_CONTINUED = ("demo", "train")  # commands that go on where they stopped
_removed: set[Path] = set()  # files that go with the process
_installed_in: list[int] = []  # the process whose signals are answered
_ending: list[int] = []


def install() -> None:
    """Answer SIGINT, SIGTERM and SIGHUP of this process from now on; those that it ignores stay ignored (nohup)."""
    if not _installed_in:
        os.register_at_fork(after_in_child=_forget)
    _installed_in[:] = [os.getpid()]
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def finish() -> None:
    """The command is done: a signal while the interpreter is taken apart must not change its exit status."""
    for number in _WORDS:
        if signal.getsignal(number) == _end:
            signal.signal(number, signal.SIG_IGN)


class removing:
    """A block in which a signal that ends the process removes a file, one that is not complete yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        _removed.add(self.path)

    def __exit__(self, *_: object) -> None:
        _removed.discard(self.path)


def line(word: str, arguments: Sequence[str]) -> str:
    """What a command that was stopped says: how, and whether it goes on where it stopped."""
    more = "; the same command continues from the last checkpoint" if arguments and arguments[0] in _CONTINUED else ""
    return f"{word}{more}\n"


def _end(number: int, _frame: object) -> None:
    if os.getpid() != _installed_in[0]:  # a child that has just been forked
        os._exit(128 + number)
    if _ending:  # a second signal while the first is answered
        return
    _ending.append(number)
    try:
        _end_children()
        for path in list(_removed):
            try:
                os.unlink(path)
            except OSError:
                pass
        _say(line(_WORDS[signal.Signals(number)], sys.argv[1:]))
    finally:
        os._exit(128 + number)


def _end_children() -> None:
    """Worker processes would find out for themselves, but only seconds later.

    Killed, not terminated: Python drops signals that reach a child before it has set itself up after the fork.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    try:
        for child in multiprocessing.active_children() if multiprocessing is not None else ():
            child.kill()
    except Exception:  # one has gone already, or torch reports its end by an exception out of a handler
        pass


def _say(text: str) -> None:
    if sys.stderr is None:  # closed by the caller: the descriptor may be another file by now
        return
    try:
        start = "\n" if os.isatty(2) else ""  # a progress bar stands on the terminal's line
        if select.select([], [2], [], 1.0)[1]:  # a reader that has stopped reading must not keep the process alive
            os.write(2, f"{start}{text}".encode())
    except OSError:
        pass


def _forget() -> None:
    """In a forked child: a terminal's Ctrl-C reaches the whole group, and the parent ends its children itself."""
    for number in _WORDS:
        if signal.getsignal(number) == _end:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)


def _is_command() -> bool:
    """Whether this process was started as `fastcl ...` or `python -m fastcl ...`."""
    given = sys.orig_argv[1:]
    for k, argument in enumerate(given):
        if argument == "-m":
            return given[k + 1 : k + 2] == ["fastcl"]
        if not argument.startswith("-"):
            return os.path.basename(argument) == "fastcl" and not os.path.isdir(argument)
    return False


if _is_command():
    install()
