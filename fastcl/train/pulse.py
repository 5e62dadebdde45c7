"""Tells which process of a run no longer answers, through torchrun's store and beside all exchanges."""

from __future__ import annotations

import itertools
import os
import threading
import time
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_EVERY, _GRACE = 0.5, 3.0  # seconds: between two signs of life, and without one to be called silent


class Pulse:
    """A sign of life of this process while it lives, and what is known of the others when an exchange fails.

    Args:
        rank, size: this process among all.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = _connected()
        self._ending, self._told, self._before = threading.Event(), threading.Event(), ""
        self._word = ""
        threading.Thread(target=self._beat, name="fastcl-pulse", daemon=True).start()

    def _beat(self) -> None:
        try:
            store = _connected()  # its own: a connection that waits for an answer cannot send
            for beat in itertools.count():
                store.set(f"beat {self.rank}", str(beat))
                if self._ending.wait(_EVERY):
                    break
            if not _tell(store, f"rank {self.rank} of {self.size} was {self._word}"):
                self._before = store.get("cause").decode()
        except RuntimeError:  # torchrun has gone
            pass
        self._told.set()

    def end(self, word: str) -> str:
        """Tell the others that this process was interrupted, or another word for it. In a second, in any thread and in
        a signal's handler. Returns the cause that another one has told before, if any."""
        self._word = word
        self._ending.set()
        self._told.wait(1.0)
        return self._before

    def silent(self) -> list[int] | None:
        """Ranks that do not answer; None if another rank has noticed first and says so; none if there is a `cause`.

        Those that give no sign of life, killed or stopped; if all do, those for which the others have waited.
        Raises RuntimeError if torchrun has gone.
        """
        self._store.set(f"failed {self.rank}", "")
        if self._store.add("failures", 1) > 1:
            # torchrun ends all when one has ended: not before the first has spoken.
            self._store.wait(["verdict"], timedelta(seconds=2 * _GRACE))
            time.sleep(_EVERY)
            return None
        if self.cause():
            self._store.set("verdict", "")
            return []
        before = self._beats()
        time.sleep(_GRACE)
        after = self._beats()
        found = [k for k in range(self.size) if k != self.rank and before[k] == after[k]]
        found = found or [k for k in range(self.size) if not self._store.check([f"failed {k}"])]
        self._store.set("verdict", "")
        return found

    def tell(self, cause: str) -> bool:
        """Tell the others why this process ends. Returns whether it is the first that does."""
        return _tell(self._store, cause)

    def cause(self) -> str:
        """What the first process that told has told; else nothing."""
        return self._store.get("cause").decode() if self._store.check(["cause"]) else ""

    def _beats(self) -> list[bytes | None]:
        names = [f"beat {k}" for k in range(self.size)]
        return [self._store.get(name) if self._store.check([name]) else None for name in names]


def _tell(store: Store, cause: str) -> bool:
    if store.add("causes", 1) > 1:
        return False
    store.set("cause", cause.encode(errors="backslashreplace").decode())
    return True


def show_traceback(error: Exception) -> None:
    """To torchrun, which shows the first that it is told of; without torchrun to standard error."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    else:
        traceback.print_exception(error)


def _connected() -> Store:
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # not in every build of PyTorch

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2 * _GRACE))
    # The store outlives a restart of the processes by torchrun.
    return PrefixStore(f"fastcl {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
