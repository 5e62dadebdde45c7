"""Markdown shared by the reports of several benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.harness.figures import CAPTION
from bench.harness.records import Record, table

TINY = "- Tiny sizes: they prove that the benchmark works and measure nothing."
Target = tuple[str, str, str, str]  # target, where, found, reached


def machine_line(facts: Record) -> str:
    """The machine, the versions and the date of the measurement."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"- Machine: {facts['device']}; {versions}; {facts['date']}."


def machine_and_load(facts: Record, tiny: bool = False) -> str:
    """`machine_line` and the load, for comparisons of providers; `tiny`: with a note on tiny sizes."""
    text = f"{machine_line(facts)} Load average at the start: {os.getloadavg()[0]:.1f}; other\n"
    text += "  processes change not only the times but their ratios."
    return f"{text}\n{TINY}" if tiny else text


def target_table(rows: Iterable[Target]) -> str:
    """Table of the targets and the measured values."""
    return table(("target", "where", "found", "reached"), rows)


def outcome(found: float | None, text: Callable[[float], str], reached: Callable[[float], bool]) -> tuple[str, str]:
    """The last two cells of a target's row; `found` is None if nothing was measured."""
    return ("not measured", "") if found is None else (text(found), "yes" if reached(found) else "no")


def time_and_memory(figure: str | None) -> str:
    """The figure of times and memory by its file name; empty without one."""
    return f"\n![Time and memory against the number of rows]({figure})\n\n{CAPTION}\n" if figure else ""


def not_run(reasons: Mapping[str, str]) -> str:
    """The providers that did not run, grouped by reason."""
    names = {why: ", ".join(name for name in reasons if reasons[name] == why) for why in reasons.values()}
    return "\nNot run. " + "; ".join(f"{why}: {names[why]}" for why in names) + ".\n" if names else ""


def not_measured(records: Sequence[Record]) -> str:
    """A line with the reason of each record that has one."""
    reasons = [f"{r['provider']}: {r['reason']}" for r in records if r["reason"]]
    return "\nNot measured: " + "; ".join(reasons) + ".\n" if reasons else ""


def mib(size: int | None) -> str:
    """Bytes in MiB; empty for None."""
    return "" if size is None else f"{size / 2**20:.1f}"
