"""What a run writes while it trains: its records, and the same curves for TensorBoard. One rank writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcl.io.run_names import RECORDS
from fastcl.train.run_folder.board import Board
from fastcl.train.run_folder.records import JsonLines


class Logbook:
    """The records of a run, and its curves while a board is open.

    Args:
        out: the folder of the run.
        writes: whether this process writes; otherwise every method does nothing.
    """

    def __init__(self, out: Path, writes: bool) -> None:
        self.files = {name: JsonLines(out / f"{name}.jsonl") for name in RECORDS}
        self._folder, self._writes = out / "tensorboard", writes
        self._board: Board | None = None
        self._steps: list[dict[str, Any]] = []
        self._pairs: list[dict[str, Any]] = []

    @contextmanager
    def board(self, step: int) -> Iterator[None]:
        """Draw curves from a step on. Raises FastclError if they cannot be written, as all methods do."""
        if not self._writes:
            yield
            return
        with Board(self._folder, step) as self._board:
            yield
        self._board = None

    def step(self, step: int, models: Sequence[Mapping[str, Any]], pair: Mapping[str, Any] | None) -> None:
        """Note what was measured in a step: of every model, and of the pair of the first two."""
        if not self._writes:
            return
        self._steps += map(dict, models)
        for row in models:
            self._curve(f"loss/{row['model']}", row["loss"], step)
        if pair is not None:
            self._pairs.append(dict(pair))
            names = "-".join(pair["pair"])
            for key, value in pair.items():
                if key not in ("step", "epoch", "pair", "lr"):
                    self._curve(f"batch_{key}/{names}", value, step)

    def epoch(self, timing: Mapping[str, Any]) -> None:
        """Write the records of an epoch's steps, and how long it took."""
        steps, self._steps = self._steps, []
        pairs, self._pairs = self._pairs, []
        if self._writes:
            self.files["steps"].append(steps)
            if pairs:
                self.files["pairs"].append(pairs)
            self.files["timing"].append([dict(timing)])

    def evaluation(self, records: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write the records of an evaluation."""
        if not self._writes:
            return
        self.files["metrics"].append(map(dict, records))
        for r in records:
            name = "-".join(r["pair"]) if "pair" in r else r["model"]
            for key, value in r.items():
                if key not in ("epoch", "pair", "model"):
                    self._curve(f"{key}/{name}", value, step)

    def flush(self) -> None:
        """Write all points of the curves."""
        if self._board is not None:
            self._board.flush()

    def _curve(self, tag: str, value: float | None, step: int) -> None:
        if self._board is not None and value is not None:
            self._board.scalar(tag, value, step)
