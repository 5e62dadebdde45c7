"""The tables of predicted milliseconds in kernels/README.md, from the committed predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bench.harness.records import Record, digits, having, read, table

_NAMES = {"ntxent": "NT-Xent", "clip": "CLIP"}


def committed(results: Path) -> list[Record]:
    """The predictions of whole losses for every architecture, forward and backward, with kernels that are on."""
    records = read(*sorted((results / "static").glob("predicted-sm_*.json"), key=lambda path: _number(path.stem)))
    return [r for r in records if "kernel" not in r and not r.get("by_hand")]


def hopper(records: Sequence[Record]) -> str:
    """NT-Xent on sm_90, each pass, by precision, rows and columns."""

    def cell(records: Sequence[Record]) -> str:
        found = {r["pass"]: digits(r["predicted_ms"]) for r in records}
        return f"{found['fwd']} + {found['bwd']} = {found['both']}"

    return _by_columns(having(records, arch="sm_90"), cell, ("precision",), left=2)


def cards(records: Sequence[Record]) -> str:
    """NT-Xent on all other architectures, both passes, by precision, rows and columns."""

    def cell(records: Sequence[Record]) -> str:
        return next(digits(r["predicted_ms"]) for r in records if r["pass"] == "both")

    others = [r for r in records if r["arch"] != "sm_90"]
    return _by_columns(others, cell, ("arch", "precision"), left=3) if others else ""


def between(records: Sequence[Record]) -> str:
    """Losses of widths between powers of two, both passes, by architecture."""
    whole = [r for r in records if r["pass"] == "both" and not _is_power(r["d"])]
    found = {(r["arch"], r["d"], r["objective"], r["precision"]): digits(r["predicted_ms"]) for r in whole}
    cases = sorted({key[1:] for key in found}, key=lambda one: (one[0], one[1] == "clip", one[2]))
    archs = dict.fromkeys(r["arch"] for r in whole)
    rows = [(arch, *(found.get((arch, *case), "") for case in cases)) for arch in archs]
    return table(("", *(f"{_NAMES[name]}, {precision}, {d}" for d, name, precision in cases)), rows, left=1)


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {"predicted": hopper, "cards": cards, "between": between}


def _by_columns(
    records: Sequence[Record], cell: Callable[[Sequence[Record]], str], names: tuple[str, ...], left: int
) -> str:
    """NT-Xent: a row for each number of rows of each group, the most first; a column for each power of two."""
    shown = [r for r in having(records, objective="ntxent") if _is_power(r["d"])]
    widths = sorted({r["d"] for r in shown})
    groups = dict.fromkeys(tuple(r[name] for name in (*names, "n")) for r in shown)
    rows = []
    for group in sorted(groups, key=lambda one: (_number(one[0]), *one[:-1], -one[-1])):
        mine = having(shown, **dict(zip((*names, "n"), group, strict=True)))
        rows.append((*group[:-1], f"{group[-1]:,}", *(cell(having(mine, d=d)) for d in widths)))
    return table((*[""] * len(names), "rows", *(f"D = {d}" for d in widths)), rows, left=left)


def _number(name: str) -> int:
    """Of an architecture, such as sm_90 or predicted-sm_90; 0: there is none."""
    end = name.rpartition("sm_")[2]
    return int(end) if end.isdecimal() else 0


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
