"""Tables and the figure of the slacks; see slack.py for what a slack is."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from bench.harness.figures import drawing
from bench.harness.records import Record, digits, having, table
from bench.theory.settings import COVERED, KINDS
from bench.theory.slack import failed

FIGURE = "slack.svg"
_LETTERS = {True: "v", False: "s", None: "-"}
# Colours of the papers' bounds, and of those that fastcl adds.
_PAPERS, _OURS = "#0072B2", "#D55E00"
OURS = ("Theorem 1, convex", "loss gap, mean", "Lemma 4, known classes", "Corollary 1, CKA of measured drift, tight",
        "Corollary 2, RSA of measured drift, tight")  # fmt: skip


def packed(facts: Record, records: Sequence[Record]) -> str:
    """The records as JSON, a line of values for each: the fields of its setting, then per bound the slack, null if
    nothing was measured, and a letter: v for vacuous, s for one that says something, - where that has no meaning."""
    fields = [field for field in records[0] if field not in ("slack", "vacuous")]
    bounds = list(dict.fromkeys(name for r in records for name in r["slack"]))
    head = {**facts, "fields": fields, "bounds": bounds}
    lines = [
        [*(r[field] for field in fields), [r["slack"].get(name) for name in bounds],
         "".join(_LETTERS[r["vacuous"].get(name)] for name in bounds)]
        for r in records
    ]  # fmt: skip
    text = ",\n".join(json.dumps(line, separators=(",", ":"), allow_nan=False) for line in lines)
    return f'{json.dumps(head, allow_nan=False)[:-1]}, "settings": [\n{text}\n]}}\n'


def read(results: Path) -> list[Record]:
    """The committed records of a folder of results; none without the file."""
    file, records = results / "theory" / "theory.json", []
    if not file.is_file():
        return records
    found = json.loads(file.read_text(encoding="utf-8"))
    for *values, slack, letters in found["settings"]:
        vacuous = {name: letter == "v" for name, letter in zip(found["bounds"], letters, strict=True) if letter != "-"}
        fields = dict(zip(found["fields"], values, strict=True))
        records.append(fields | {"slack": dict(zip(found["bounds"], slack, strict=True)), "vacuous": vacuous})
    return records


def covered(records: Sequence[Record]) -> str:
    """One row per bound: in how many settings it was measured, said something, failed, and the slack as a factor."""
    mine = having(records, kind=COVERED)
    rows = []
    for name in names(mine):
        found = _slacks(mine, name)
        says = [not r["vacuous"][name] for r in mine if name in r["vacuous"]]
        counts = f"{sum(says):,}" if says else "", f"{len(found):,}", f"{sum(map(failed, found)):,}"
        rows.append((name, *counts, _factor(min(found)), _factor(statistics.median(found))))
    head = ("bound", "settings where it says something", "measured", "failed", "least bound / measured", "median")
    return table(head, rows, left=1)


def outside(records: Sequence[Record]) -> str:
    """One row for each kind of setting outside the assumptions and bound that failed there."""
    rows = []
    for kind in (kind for kind in KINDS if kind != COVERED):
        mine = having(records, kind=kind)
        for name in names(mine):
            found = _slacks(mine, name)
            if few := sum(map(failed, found)):
                rows.append((KINDS[kind], name, f"{len(found):,}", f"{few:,}", _factor(min(found))))
    return table(("what is changed", "bound that failed", "measured", "failed", "least bound / measured"),
                 rows)  # fmt: skip


def names(records: Sequence[Record]) -> list[str]:
    """The bounds with a slack in some record, in their order."""
    known = dict.fromkeys(name for r in records for name in r["slack"])
    return [name for name in known if any(r["slack"].get(name) is not None for r in records)]


def body(records: Sequence[Record]) -> str:
    """The report below its head."""
    return (
        f"Within the assumptions of the theorem:\n\n{covered(records)}\n"
        f"![Slack of every bound]({FIGURE})\n\n"
        f"Outside of them, what failed:\n\n{outside(records)}"
    )


def draw(records: Sequence[Record], folder: Path) -> None:
    """Write the figure: per bound the least slack, 5 % to 95 %, the quartiles and the median."""
    mine = having(records, kind=COVERED)
    shown = names(mine)
    with drawing(folder / FIGURE, 9, 0.7 + 0.33 * len(shown)) as figure:
        ax = figure.subplots()
        for row, name in enumerate(reversed(shown)):
            found, colour = sorted(_slacks(mine, name)), _OURS if name in OURS else _PAPERS
            low, first, middle, third, high = (_quantile(found, share) for share in (0.05, 0.25, 0.5, 0.75, 0.95))
            ax.plot([low, high], [row, row], color=colour, linewidth=1.5, alpha=0.6)
            ax.plot([first, third], [row, row], color=colour, linewidth=7, alpha=0.6, solid_capstyle="butt")
            ax.plot([middle], [row], "|", color="black", markersize=9)
            ax.plot([found[0]], [row], "o", color=colour, markersize=4)
        ax.axvline(0, color="#24292f", linewidth=1)
        ax.set_yticks(range(len(shown)), list(reversed(shown)))
        ax.set_xscale("symlog", linthresh=1, linscale=1)  # of logarithms: up to 10 as on any logarithmic axis
        ticks = [*map(math.log10, (1, 2, 5, 10, 100)), 5, 10, 20]
        ax.set_xticks(ticks, [f"{10**tick:.3g}" if tick < 3 else f"$10^{{{tick}}}$" for tick in ticks])
        ax.set_xlim(-0.1, 30)
        ax.minorticks_off()
        for label, colour in (("the papers' bounds", _PAPERS), ("sharper forms that fastcl adds", _OURS)):
            ax.plot([], [], color=colour, linewidth=7, alpha=0.6, label=label)
        figure.legend(loc="outside upper right", ncols=2)
        ax.set_xlabel(
            "bound / measured: 1 is tight, below 1 it fails. Dot: least; bars: 5 to 95 % and quartiles\n"
            "(logarithmic up to 10; beyond, the exponent of 10 is on a logarithmic scale)"
        )
        ax.grid(True, axis="x")


def _slacks(records: Sequence[Record], name: str) -> list[float]:
    return [r["slack"][name] for r in records if r["slack"].get(name) is not None]


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _factor(slack: float) -> str:
    return digits(10**slack) if slack < 4 else f"10^{slack:.1f}"
