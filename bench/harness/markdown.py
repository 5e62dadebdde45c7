"""Markdown shared by the reports of several benchmarks."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from bench.harness.clocks import QUICK
from bench.harness.records import Record, digits, table

TINY = "- Tiny sizes: they prove that the benchmark works and measure nothing."
CAPTION = "A line ends where the next size did not fit the limits of the run."
Target: TypeAlias = tuple[str, str, str, str]  # target, where, found, reached


def machine_line(facts: Record) -> str:
    """The machine, the versions and the date of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"{facts['device']}; {versions}; {facts['date']}"


def conditions(facts: Record, args: argparse.Namespace) -> str:
    """The machine, the versions, the date and the load of a run, and a note on tiny sizes."""
    load = f"{os.getloadavg()[0]:.1f}; other\n  processes change not only the times but their ratios."
    text = f"- Machine: {machine_line(facts)}. Load average at the start: {load}"
    return text + (f"\n{TINY}" if getattr(args, "tiny", False) else "")


def rounds(args: argparse.Namespace, what: str = "rounds") -> str:
    """How the times of a run are taken."""
    text = f"median (minimum-maximum) of at most {args.repeats} {what}, fewer after {args.seconds:g} s per\n"
    return text + (
        "  provider. In a round every provider runs once, in an order that changes from round to round; calls\n"
        f"  below {QUICK:g} ms on a CPU are repeated for that long, and the last one counts"
    )


def allowed(tolerances: Mapping[str, float]) -> str:
    """The tolerances by precision."""
    return ", ".join(f"{tolerance:g} ({name})" for name, tolerance in tolerances.items())


def goal(
    what: str, where: str, found: float | None, limit: float, text: Callable[[float], str], least: bool = False
) -> Target:
    """A row of the target table; `found` is None if nothing was measured, `least`: it should be the limit or more."""
    if found is None:
        return what, where, "not measured", ""
    return what, where, text(found), "yes" if (found >= limit if least else found <= limit) else "no"


def target_table(rows: Iterable[Target]) -> str:
    """Table of the targets and the measured values."""
    return table(("target", "where", "found", "reached"), rows)


def time_and_memory(figure: str | None) -> str:
    """The figure of times and memory by its file name; empty without one."""
    return f"\n![Time and memory against the number of rows]({figure})\n\n{CAPTION}\n" if figure else ""


def absent(records: Sequence[Record]) -> dict[str, str]:
    """Providers without times at any size and their reasons, each one that does not depend on the size."""
    reasons: dict[str, set[str]] = {}
    for r in records:
        reasons.setdefault(r["provider"], set()).add(r["reason"] or "")
    alone = {name: found.pop() for name, found in reasons.items() if len(found) == 1}
    return {name: why for name, why in alone.items() if never(why)}


def never(reason: str) -> bool:
    """Whether a reason holds for every size."""
    return reason.startswith(("has no ", "timed on ")) or reason.endswith(" is not installed")


def not_run(reasons: Mapping[str, str]) -> str:
    """The providers that did not run, grouped by reason."""
    names = {why: ", ".join(name for name in reasons if reasons[name] == why) for why in reasons.values()}
    return "\nNot run. " + "; ".join(f"{why}: {names[why]}" for why in names) + ".\n" if names else ""


def not_measured(records: Sequence[Record]) -> str:
    """A line with the reason of each record that has one."""
    reasons = [f"{r['provider']}: {r['reason']}" for r in records if r["reason"]]
    return "\nNot measured: " + "; ".join(reasons) + ".\n" if reasons else ""


def mib(size: int | None, form: str = ".1f") -> str:
    """Bytes in MiB; empty for None."""
    return "" if size is None else f"{size / 2**20:{form}}"


def gib(size: int | None) -> str:
    """Bytes in GiB."""
    return "not measured" if size is None else f"{size / 2**30:.1f}"


def percent(share: float | None, form: str = ".3g") -> str:
    """A share in percent; empty for None."""
    return "" if share is None else f"{100 * share:{form}} %"


def times(ratio: float | None) -> str:
    """A factor, as "2.5x"; empty for None."""
    return "" if ratio is None else f"{digits(ratio)}x"
