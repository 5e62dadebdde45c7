"""Evaluations of several models side by side, as rows of text for a terminal and a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

from fastcl.evaluation.findings import Evaluation, Spread

Split: TypeAlias = Literal["train", "test"]
_NONE = "–"
_CLASSIFIERS = {"ncc": "nearest centre", "linear": "linear probe"}


def accuracy_rows(
    models: Mapping[str, Evaluation], split: Split, probes: Sequence[str] | None = None
) -> list[list[str]]:
    """One row per probe and setting: its name, then the accuracy of each model; a dash where it was not measured.

    Args:
        models: by name.
        split: whose accuracy.
        probes: names of probes to show; None: all that any model has.
    """
    found = [dict(_cells(evaluation, split, probes)) for evaluation in models.values()]
    names = dict.fromkeys(name for cells in found for name in cells)
    return [[name, *(cells.get(name, _NONE) for cells in found)] for name in names]


def remarks(models: Mapping[str, Evaluation]) -> list[str]:
    """What a reader of the rows has to know, in sentences."""
    lines = []
    for name, one in models.items():
        if one.unseen:
            labels = ", ".join(map(str, one.unseen[:5])) + (", ..." if len(one.unseen) > 5 else "")
            lines.append(
                f"{name}: {one.unseen_rows} of {one.test_rows} test rows have labels that no training row has "
                f"({labels}); every probe counts them as wrong."
            )
        if one.linear is not None and not one.linear.converged:
            lines.append(f"{name}: a fit of the linear probe did not converge.")
        if one.linear is not None and one.linear.sweep and one.linear.penalty == one.linear.sweep[-1][0]:
            lines.append(
                f"{name}: the linear probe chose the weakest penalty that it was given, {one.linear.penalty:g}."
            )
        failed = [f"{few.shots}" for few in one.few_shot if not few.converged]
        if failed:
            lines.append(f"{name}: few-shot linear probes did not all converge, of {', '.join(failed)} shots.")
    return lines


def _cells(one: Evaluation, split: Split, probes: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    """Name and text of each accuracy."""

    def wanted(probe: str) -> bool:
        return probes is None or probe in probes

    if one.linear is not None and wanted("linear"):
        yield "linear probe", _number(getattr(one.linear, split))
        if split == "train":
            yield "  its penalty", f"{one.linear.penalty:g}"
    if one.ncc is not None and wanted("ncc"):
        yield "nearest class centre", _number(getattr(one.ncc, split))
    for found in one.knn if wanted("knn") else ():
        yield f"{found.k} nearest, {found.vote}", _number(getattr(found, split))
    for few in one.few_shot if wanted("few_shot") else ():
        plural = "" if few.shots == 1 else "s"
        yield f"{few.shots} shot{plural}, {_CLASSIFIERS[few.classifier]}", _spread(getattr(few, split))


def _number(value: float) -> str:
    return f"{value:.4f}"


def _spread(value: Spread | None) -> str:
    if value is None:
        return _NONE
    return _number(value.mean) + (f" ± {value.interval:.3f}" if value.interval is not None else "")
