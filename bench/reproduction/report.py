"""The tables of the reproduction."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.harness.markdown import machine_line
from bench.harness.records import Record, table
from bench.reproduction.claims import NO, NOISE, OPEN, YES, Claim, Finding, Interval, interval, verdict
from bench.reproduction.experiments import EXPERIMENTS, FAMILIES
from bench.reproduction.questions import CLAIMS
from bench.reproduction.rows import Row, folder_of, having
from fastcl.report.run import PAIR_MEASURES

ABOUT = "about.json"  # machine, versions and date of the runs


def conditions(about: Record) -> str:
    """Device, versions, date and the time of the training in one line."""
    facts = about | {"device": about["device"].partition(",")[0], "date": about["date"][:10]}
    return f"{machine_line(facts)}; one thread a run; all epochs took {about['core_hours']:g} core hours."


def answers(rows: Sequence[Row]) -> str:
    """One row per claim: how many differences are positive on average, how many answers of each kind, the verdict."""
    found = []
    for claim in CLAIMS:
        findings = claim.find(rows)
        each = [finding.answer for finding in findings]
        counts = Counter(each)
        positive = f"{sum(finding.difference.mean > 0 for finding in findings)} of {len(findings)}"
        numbers = (str(counts[word]) for word in (YES, NOISE, OPEN, NO))
        found.append((claim.text, claim.figure, f"**{verdict(each)}**" if each else "was not run", positive, *numbers))
    return table(("claim", "paper", "here", "on average", YES, NOISE, OPEN, NO), found, left=3)


def details(rows: Sequence[Row], claim: Claim) -> str:
    """One row per finding of a claim."""
    found = []
    for one in claim.find(rows):
        first, second = (interval(values) for values in zip(*one.values, strict=True))
        more = (_with_limits(interval(one.control)),) if one.control is not None else ()
        found.append((_where(one), PAIR_MEASURES[one.measure], _with_spread(first), _with_spread(second),
                      _with_limits(one.difference), *more, one.answer))  # fmt: skip
    control = (claim.control,) if claim.control else ()
    return table(("runs", "measure", claim.first, claim.second, "difference", *control, "answer"), found)


def debiased(rows: Sequence[Row]) -> str:
    """Which answers are others with debiased CKA in the place of CKA."""
    swapped = [row._replace(cka=row.cka_debiased) for row in rows]
    changed, count = [], 0
    for claim in CLAIMS:
        for before, after in zip(claim.find(rows), claim.find(swapped), strict=True):
            count += before.measure == "cka"
            if before.answer != after.answer:
                changed.append((claim.name, _where(before), before.answer, after.answer))
    if not changed:
        return f"With debiased CKA in the place of CKA all {count} answers are the same.\n"
    told = f"With debiased CKA in the place of CKA {len(changed)} of {count} answers are others:\n\n"
    return told + table(("claim", "runs", "CKA", "debiased CKA"), changed, left=4)


def accuracies(rows: Sequence[Row]) -> str:
    """Nearest-class-centre accuracy of every model of the sweeps over objectives, mean ± spread."""
    found = []
    for experiment in EXPERIMENTS:
        mine = having(rows, experiment=experiment.name, other="")
        if "ce" in experiment.models and mine:
            ncc = ([row.ncc for row in having(mine, model=model) if row.ncc is not None] for model in experiment.models)
            cells = [_with_spread(interval([100 * one for one in each]), 1) for each in ncc]
            name = f"{experiment.name.removesuffix('-published')}, CL: `{experiment.models[0]}`"
            found.append((name, str(mine[0].classes), f"{100 / mine[0].classes:.1f}", *cells))
    return table(("runs", "classes", "chance", "CL", "NSCL", "SCL", "CE"), found, left=1)


def sweeps(rows: Sequence[Row]) -> str:
    """One row per sweep: its data, models, settings and length."""
    found = []
    for experiment in EXPERIMENTS:
        if not (mine := having(rows, experiment=experiment.name)):
            continue
        several = [_several(mine, field) for field in ("classes", "batch", "temperature", "images")]
        steps = [max(row.step for row in mine if row.run == run) for run in {row.run for row in mine}]
        length = f"{min(steps)}" if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
        found.append((experiment.name, *several, length, str(len({row.seed for row in mine}))))
    head = ("sweep", "classes", "batch", "temperature", "evaluated images", "steps", "seeds")
    return table(head, found, left=1)


def body(rows: Sequence[Row]) -> str:
    """All tables, each claim with its findings."""
    parts = [answers(rows)]
    parts += [f"{claim.figure}: {claim.text}\n\n{details(rows, claim)}" for claim in CLAIMS if claim.find(rows)]
    return "\n".join([*parts, debiased(rows), "Accuracies (%):\n", accuracies(rows), "Sweeps:\n", sweeps(rows)])


def _where(finding: Finding) -> str:
    objectives = " and ".join(f"`{name}`" for name in FAMILIES[finding.family])
    return f"{finding.experiment.removesuffix('-published')}, {objectives}"


def _several(rows: Sequence[Row], field: str) -> str:
    return ", ".join(f"{value:,g}" for value in sorted({getattr(row, field) for row in rows}))


def _with_spread(found: Interval, decimals: int = 3) -> str:
    return f"{found.mean:.{decimals}f} ± {found.spread:.{decimals}f}"


def _with_limits(found: Interval) -> str:
    return f"{found.mean:+.3f} ({found.mean - found.half:+.3f} to {found.mean + found.half:+.3f})"


def about(results: Path) -> Record:
    """The machine, versions and date of the committed runs; empty if there are none."""
    file = folder_of(results) / ABOUT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


# The tables of the page that are made of rows.
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "reproduction": answers,
    "reproduction-debiased": debiased,
    "reproduction-sweeps": sweeps,
    "reproduction-accuracies": accuracies,
    **{f"reproduction-{claim.name.replace(' ', '-')}": partial(details, claim=claim) for claim in CLAIMS},
}
