"""A run's alignment beside the published curves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcl.errors import FastclError, shown
from fastcl.paper.matching import Difference, differences, models_of, target_for
from fastcl.paper.published import HELD_OUT, MEASURES, Curve, Target, published, target_named
from fastcl.report.run import Number, Run, Series, known, load_run

WITHIN, BELOW, ABOVE = "within", "below", "above"


@dataclass(frozen=True)
class Row:
    """One evaluation of a run beside a published curve.

    Attributes:
        epoch: completed epochs.
        measure, model: as in `Curve`.
        ours: the run's value; None where undefined.
        paper: the published value at that epoch; None outside the published epochs.
        interpolated: whether it lies between two published epochs.
        low, high: the band; values in it cannot be told from the published one.
    """

    epoch: int
    measure: str
    model: str
    ours: Number
    paper: float | None
    interpolated: bool
    low: float | None
    high: float | None

    @property
    def difference(self) -> float | None:
        """Ours minus the published value."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    @property
    def place(self) -> str | None:
        """ "within", "below" or "above" the band; None if either value is missing."""
        if self.ours is None or self.low is None or self.high is None:
            return None
        return BELOW if self.ours < self.low else ABOVE if self.ours > self.high else WITHIN


@dataclass(frozen=True)
class Comparison:
    """A run beside a published one.

    Attributes:
        run, target: the two.
        cl: the run's CL model.
        models: the paper's name of each supervised model -> the run's.
        curves: the published curves that are compared, those of held-out images where there are any.
        rows: by measure, model and epoch.
        differences: between the two settings.
    """

    run: Run
    target: Target
    cl: str
    models: dict[str, str]
    curves: tuple[Curve, ...]
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]

    def basis(self) -> str:
        """What is compared with what: the images that each side measured on."""
        held_out = all(curve.split == HELD_OUT for curve in self.curves)
        images = self.run.data.get("test")
        ours = f"{images:,} held-out images" if type(images) is int else "the held-out images"
        paper = "held-out" if held_out else "training"
        text = (
            f"Ours: {ours}, encoder outputs, biased linear CKA and cosine RSA. Published: {paper} images, the same "
            "outputs and measures, CKA from a random 10,000 of them where there are more (the paper's text defines CKA "
            "otherwise, on cosine similarities)."
        )
        if not held_out:
            low, high = published().above
            text += (
                f" On held-out images the published curves of Fig. 2 lie {low:.2f} to {high:.2f} above those of "
                "training images, so the band reaches as far up."
            )
        return text

    def record(self) -> dict[str, Any]:
        """All of it as JSON values."""
        rows = [
            {
                "epoch": row.epoch, "measure": row.measure, "model": row.model, "ours": row.ours, "paper": row.paper,
                "interpolated": row.interpolated, "difference": row.difference, "band": [row.low, row.high],
                "place": row.place,
            }
            for row in self.rows
        ]  # fmt: skip
        return {
            "target": self.target.name, "shows": self.target.summary(), "source": published().about,
            "basis": self.basis(), "cl": self.cl, "models": self.models, "rows": rows,
            "differences": [one._asdict() for one in self.differences], "remarks": list(self.target.remarks),
        }  # fmt: skip


def compare(run_dir: Path, target: str | None = None) -> Comparison:
    """Lay a run, finished or not, beside a published one.

    Args:
        run_dir: folder of the run.
        target: name of the published run; None: that of the same data set, number of classes and temperature.

    Raises:
        FastclError: a folder that holds no run, a run without evaluated epochs, without a CL model or without a
            supervised one that the target has; an unknown target, or none that fits.
    """
    chosen = None if target is None else target_named(target)
    run = load_run(Path(run_dir))
    cl, models = models_of(run)
    chosen = chosen or target_for(run)
    found = [chosen.curve(measure, role, HELD_OUT) for measure in MEASURES for role in models]
    curves = tuple(curve for curve in found if curve is not None)
    if not curves:
        has = ", ".join(dict.fromkeys(curve.model for curve in chosen.curves))
        raise FastclError(f"target {chosen.name} has curves of {has}; the run has {', '.join(models.values())}")
    rows: list[Row] = []
    for curve in curves:
        rows += _rows(run.pair_series(cl, models[curve.model]), curve, band(chosen, curve))
    if not rows:
        raise FastclError(f"{shown(run.path)}: no evaluation of {cl} beside {', '.join(models.values())}")
    return Comparison(run, chosen, cl, models, curves, tuple(rows), tuple(differences(run, chosen, cl, models)))


def band(target: Target, curve: Curve) -> tuple[float, float]:
    """How far below and above a published value a run's value cannot be told from it: the error of reading the figure
    and, if the curve is one of training images, what held-out images add."""
    low, high = published().above if curve.split != HELD_OUT else (0.0, 0.0)
    return target.error - low, target.error + high


def _rows(series: Series, curve: Curve, margins: tuple[float, float]) -> Iterator[Row]:
    down, up = margins
    for epoch in sorted(series):
        ours, paper = series[epoch][curve.measure], curve.at(epoch)
        low, high = (None, None) if paper is None else (paper - down, paper + up)
        between = paper is not None and epoch not in curve.points
        yield Row(epoch, curve.measure, curve.model, ours if known(ours) else None, paper, between, low, high)
