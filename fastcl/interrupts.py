"""Handles signals that end a command: one line of text and the right exit status, at any moment.

The handler does not raise; it exits the process. An exception would be swallowed in a finaliser, printed as a traceback
while modules are imported, and could itself be interrupted by a second signal. Exiting at once is safe because every
file that a command writes is complete or absent, as it has to be for SIGKILL too.

`import fastcl` loads this module first: in the process of the command it handles signals from then on, even while torch
is imported. A process that merely uses the package keeps its own handlers. Only small modules are imported here,
because signals are not handled before this one is loaded.
"""

from __future__ import annotations

import os
import select
import signal
import sys

TYPE_CHECKING = False  # importing typing would take longer than everything else here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from subprocess import Popen

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM", signal.SIGHUP: "ended by SIGHUP"}
_CONTINUED = ("demo", "train", "sweep")  # commands that can resume
_removed: set[Path] = set()  # files to delete on exit by a signal
_groups: set[int] = set()  # process groups to kill on exit by a signal
_starting: list[int] = []  # not empty while a process is started whose id is not known yet
_late: list[int] = []  # signals that came meanwhile
_installed_in: list[int] = []  # id of the process whose signals are handled
_ending: list[int] = []
_ends: list[Callable[[str], str]] = []  # as `watch` takes them


def install() -> None:
    """Handle SIGINT, SIGTERM and SIGHUP in this process from now on; ignored signals stay ignored (nohup)."""
    if not _installed_in:
        os.register_at_fork(after_in_child=_forget)
    _installed_in[:] = [os.getpid()]
    for number in _WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def finish() -> None:
    """Ignore signals after the command has finished, so that none changes its exit status while Python shuts down."""
    for number in _WORDS:
        if signal.getsignal(number) == _end:
            signal.signal(number, signal.SIG_IGN)


def watch(ends: Callable[[str], str]) -> None:
    """From now on a signal also ends this process while its main thread is in a library, such as in an exchange with
    other processes, where Python does not handle signals. Only the first of torchrun's processes says that it ended.

    Args:
        ends: called just before, with how it ends; returns why another process has ended before, if it has.
    """
    if _installed_in != [os.getpid()]:
        return
    import threading

    _ends.append(ends)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def end() -> None:
        while number := os.read(reader, 1):
            if number[0] in _WORDS and signal.getsignal(number[0]) == _end:
                _end(number[0], None)

    threading.Thread(target=end, name="fastcl-signals", daemon=True).start()


class removing:
    """Context in which a signal that ends the process also removes an incomplete file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        _removed.add(self.path)

    def __exit__(self, *_: object) -> None:
        _removed.discard(self.path)


def started(start: Callable[[], Popen[bytes]]) -> Popen[bytes]:
    """A process that `start` begins as the leader of a group of its own, which a signal that ends this one kills too.

    Once the process has ended, or is to end, call `ended`.
    """
    _starting.append(0)
    try:
        process = start()
        _groups.add(process.pid)
        return process
    finally:
        _starting.pop()
        while _late:
            _end(_late.pop(), None)


def ended(process: Popen[bytes]) -> None:
    """Kill what is left of a process that `started` began, and of its group."""
    _groups.discard(process.pid)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:  # nothing is left
        pass


def line(word: str, arguments: Sequence[str]) -> str:
    """Message of a command that was stopped: how, and whether it can resume."""
    more = "; the same command resumes from the last checkpoint" if arguments and arguments[0] in _CONTINUED else ""
    return f"{word}{more}\n"


def _end(number: int, _frame: object) -> None:
    if os.getpid() != _installed_in[0]:  # a child that has just been forked
        os._exit(128 + number)
    if _starting:
        _late.append(number)
        return
    if _ending:  # a second signal while the first is being handled
        return
    _ending.append(number)
    try:
        for group in list(_groups):
            try:
                os.killpg(group, signal.SIGKILL)  # their files are complete or absent, as after any kill
            except OSError:
                pass
        _end_children()
        for path in list(_removed):
            try:
                os.unlink(path)
            except OSError:
                pass
        word = _WORDS[signal.Signals(number)]
        before = [why for ends in _ends if (why := ends(word))]
        if os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ:
            # SIGTERM is what torchrun ends the others with.
            shown = f"{word} ({before[0]})" if before and number == signal.SIGTERM else word
            _say(line(shown, sys.argv[1:]))
    finally:
        os._exit(128 + number)


def _end_children() -> None:
    """Kill worker processes, which would otherwise notice only seconds later.

    Killed, not terminated: Python drops signals that reach a child before it is set up after the fork.
    """
    multiprocessing = sys.modules.get("multiprocessing")
    try:
        for child in multiprocessing.active_children() if multiprocessing is not None else ():
            child.kill()
    except Exception:  # one has already exited, or torch's handler reports its exit by an exception
        pass


def _say(text: str) -> None:
    if sys.stderr is None:  # closed by the caller: the descriptor may now belong to another file
        return
    try:
        start = "\n" if os.isatty(2) else ""  # a progress bar may occupy the current line
        if select.select([], [2], [], 1.0)[1]:  # do not block on a reader that has stopped reading
            os.write(2, f"{start}{text}".encode())
    except OSError:
        pass


def _forget() -> None:
    """Reset the handlers in a forked child. SIGINT is ignored: Ctrl-C reaches the whole process group, and the parent
    ends its children itself."""
    signal.set_wakeup_fd(-1)
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
