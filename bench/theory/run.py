"""How far every bound of fastcl.theory is from what it bounds, in similarity descents of random settings.

theory.json has the settings and slacks, theory.md the tables, slack.svg the figure. The first seed settles all that is
drawn. Exit status 1 if a bound failed within the assumptions of its theorem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.harness.command import Command, at_least
from bench.harness.markdown import machine_line
from bench.harness.records import Record, having, machine, write_file
from bench.theory import report
from bench.theory.settings import COVERED, KINDS, drawn
from bench.theory.slack import failed, slacks

BENCH = "theory"


def count(kind: str, settings: int) -> int:
    """The number of settings of a kind."""
    return settings if kind == COVERED else -(-settings // 4)


def measured(settings: int, first: int, most: int) -> Iterator[Record]:
    """A record per setting: so many that the theorem covers, and a quarter as many of each other kind."""
    for kind in KINDS:
        for seed in range(first, first + count(kind, settings)):
            setting = drawn(seed, kind, most)
            found = slacks(setting)
            yield {
                **{name: _short(value) for name, value in asdict(setting).items()},
                "slack": {name: _short(slack.log10) for name, slack in found.items()},
                "vacuous": {name: slack.vacuous for name, slack in found.items() if slack.vacuous is not None},
            }


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results; return the exit status."""
    parser = Command(BENCH, [__doc__ or ""])
    parser.add_argument("--settings", type=at_least(1), default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="first seed (default: %(default)s)")
    parser.add_argument("--samples", type=at_least(2), default=300, metavar="N", help="at most (default: %(default)s)")
    args = parser.parse(argv)
    total = sum(count(kind, args.settings) for kind in KINDS)
    found = measured(args.settings, args.seed, args.samples)
    records = list(tqdm(found, total=total, desc="descending", unit="setting", disable=None))
    facts = machine(torch.device("cpu"))
    _write(args.out, facts, records)
    print(report.covered(records) + "\n" + report.outside(records))
    within = [r["slack"] for r in having(records, kind=COVERED)]
    if names := {name for found in within for name, slack in found.items() if failed(slack)}:
        print(f"failed within the assumptions: {', '.join(sorted(names))}")
    return int(bool(names))


def _write(folder: Path, facts: Record, records: list[Record]) -> None:
    write_file(folder / f"{BENCH}.json", report.packed(facts, records))
    text = f"# Slack of the bounds\n\n{machine_line(facts)}.\n\n{report.body(records)}"
    write_file(folder / f"{BENCH}.md", text)
    report.draw(records, folder)


def _short(value: Any) -> Any:
    """Four digits of a float; anything else as it is."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
