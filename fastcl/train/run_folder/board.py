"""Writes curves for TensorBoard, in the foreground.

TensorBoard's own writer uses a background thread, so that on a full disk its traceback appears at some later step.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from fastcl.train.run_folder.records import writing

_WAIT = 30.0  # seconds between writes within an epoch


class Board:
    """Writes one event file per start of a run.

    Args:
        folder: folder of the event files, created if absent.
        step: steps completed so far; TensorBoard ignores points of earlier files from this step on.

    Raises:
        FastclError: from every method: the file cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self._written, self._waiting = time.monotonic(), []
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / name, "xb")
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), step=step, file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            with suppress(OSError):  # everything is written, or the failure has been reported
                self._file.close()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to a curve; on disk within half a minute, or at the next flush."""
        value = Summary.Value(tag=tag, simple_value=value)
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
        if time.monotonic() - self._written > _WAIT:
            self.flush()

    def flush(self) -> None:
        """Write all points added so far."""
        waiting, self._waiting = self._waiting, []
        with writing(self.folder):
            for event in waiting:
                self._records.write(event)
            self._records.flush()
        self._written = time.monotonic()

    def _add(self, event: Event) -> None:
        self._waiting.append(event.SerializeToString())
