"""Markdown that the reports of several benchmarks share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.harness.figures import CAPTION
from bench.harness.records import Record, table

TINY = "- Tiny sizes: they prove that the benchmark works and measure nothing."
Target = tuple[str, str, str, str]  # target, where, found, reached


def machine_line(facts: Record) -> str:
    """What the numbers were measured on and with, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"- Machine: {facts['device']}; {versions}; {facts['date']}."


def machine_and_load(facts: Record, tiny: bool = False) -> str:
    """The same where providers are compared; `tiny`: the sizes were."""
    text = f"{machine_line(facts)} Load average at the start: {os.getloadavg()[0]:.1f}; other\n"
    text += "  processes change not only the times but their ratios."
    return f"{text}\n{TINY}" if tiny else text


def target_table(rows: Iterable[Target]) -> str:
    """Targets and what was found."""
    return table(("target", "where", "found", "reached"), rows)


def outcome(found: float | None, text: Callable[[float], str], reached: Callable[[float], bool]) -> tuple[str, str]:
    """The last two cells of a target; None: nothing was measured."""
    return ("not measured", "") if found is None else (text(found), "yes" if reached(found) else "no")


def time_and_memory(figure: str | None) -> str:
    """The figure of times and memory, by the name of its file; nothing where there is none."""
    return f"\n![Time and memory against the number of rows]({figure})\n\n{CAPTION}\n" if figure else ""


def not_run(reasons: Mapping[str, str]) -> str:
    """Providers by the reason why they did not run."""
    names = {why: ", ".join(name for name in reasons if reasons[name] == why) for why in reasons.values()}
    return "\nNot run. " + "; ".join(f"{why}: {names[why]}" for why in names) + ".\n" if names else ""


def not_measured(records: Sequence[Record]) -> str:
    """The reason of each record that has one."""
    reasons = [f"{r['provider']}: {r['reason']}" for r in records if r["reason"]]
    return "\nNot measured: " + "; ".join(reasons) + ".\n" if reasons else ""


def mib(size: int | None) -> str:
    """Bytes in MiB; nothing for None."""
    return "" if size is None else f"{size / 2**20:.1f}"
