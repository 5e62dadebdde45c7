"""The figures of the paper with ours beside them: means over the seeds, bands from the lowest to the highest seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.reproduction.experiments import FAMILIES, PAPER
from bench.reproduction.panels import Column, Line, write_figure
from bench.reproduction.questions import MEASURES
from bench.reproduction.rows import Row, having
from fastcl.paper.published import Target, targets
from fastcl.report.run import PAIR_MEASURES, RESEEDED

# Label, colour and marker (Okabe and Ito's palette).
_NSCL, _FLOOR = ("NSCL", "#D55E00", "s"), ("CL on other views (noise floor)", "#808080", "o")
_MODELS = {"nscl": _NSCL, "nscl_with_positive": _NSCL, "supcon": ("SCL (SupCon)", "#009E73", "^"),
           "ce": ("CE", "#CC79A7", "D"), RESEEDED: _FLOOR}  # fmt: skip
_FAMILIES = {"paper": ("NSCL, the paper's formulas", "#D55E00", "s"),
             "code": ("NSCL, losses of the authors' code", "#0072B2", "v")}  # fmt: skip
_SETS = {"mini-imagenet": ("Mini-ImageNet", "#E69F00", "P"), "tiny-imagenet": ("Tiny-ImageNet", "#56B4E9", "X"),
         "cifar100": ("CIFAR-100", "#CC79A7", "D"), "imagenet-1k": ("ImageNet-1k", "#000000", "d"),
         "cifar10": ("CIFAR-10, epochs 60 to 90", "#0072B2", "x")}  # fmt: skip
_RULES = {"linear": ("learning rate ~ batch", "#D55E00", "s"), "sqrt": ("~ its square root", "#009E73", "^"),
          "fourth-root": ("~ its fourth root", "#0072B2", "v")}  # fmt: skip
# The authors' notebooks: CIFAR-10 by the number of classes, mean over epochs 60 to 90.
_CIFAR10 = {
    "cka": {2: 0.643, 4: 0.737, 6: 0.740, 8: 0.778, 10: 0.791},
    "rsa": {2: 0.629, 4: 0.712, 6: 0.721, 8: 0.769, 10: 0.784},
}
_OURS = {"omniglot": "Omniglot", "cifar10": "CIFAR-10", "fruits": "fruits"}
# Fig. 6, CIFAR-100: completed epochs -> mean relative distance of the weights.
_GAP = {10: 0.195, 20: 0.310, 50: 0.452, 100: 0.575, 200: 0.702, 400: 0.80, 600: 0.84, 800: 0.861, 1000: 0.870,
        1200: 0.876, 2400: 0.880}  # fmt: skip
_GAP_SCL = {10: 0.208, 20: 0.348, 50: 0.495, 100: 0.620, 200: 0.757, 400: 0.88, 600: 0.944, 800: 0.971, 1000: 0.978,
            1200: 0.977, 2400: 0.965}  # fmt: skip
EPOCH = 90  # of the published points by classes and temperature: later ones of Fig. 4 stand at wrong epochs
LATE = 200  # of those by batch size: the last


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Write the figures into a folder."""
    for family in FAMILIES:
        columns = [Column("published, CIFAR-100", "epochs", _published_over_time), *_over_time(rows, family)]
        write_figure(folder / f"objectives-{family}.svg", MEASURES, columns)
        columns[0] = Column("published, CIFAR-100", "epochs", _published_weights)
        measures = {key: PAIR_MEASURES[key] for key in ("weight_gap", "cka")}
        write_figure(folder / f"weights-{family}.svg", measures, columns)
    for key, x in (("classes", "classes"), ("temperature", "temperature")):
        published = Column(f"published, epoch {EPOCH}", x, partial(_published_ends, key), True, "not published")
        ours = [Column(f"ours, {_OURS[data]}", x, partial(_ends, rows, key, data), spaced=True)
                for data in ("omniglot", "cifar10")]  # fmt: skip
        write_figure(folder / f"{key}.svg", MEASURES, [published, *ours], same_y=key == "classes")
    columns = [
        Column(f"published, Mini-ImageNet, epoch {LATE}", "batch size", _published_batches, True),
        Column("ours, Omniglot", "batch size", partial(_batches, rows), spaced=True),
    ]
    write_figure(folder / "batch.svg", MEASURES, columns)


def _over_time(rows: Sequence[Row], family: str) -> list[Column]:
    def lines(data: str, measure: str) -> list[Line]:
        mine = having(rows, experiment=data if family == "paper" else f"{data}-published")
        reference, nscl = FAMILIES[family]
        return [Line(*_MODELS[other], _points(mine, "step", (reference, other), measure))
                for other in (nscl, "supcon", "ce", RESEEDED)]  # fmt: skip

    return [Column(f"ours, {name}", "steps", partial(lines, data)) for data, name in _OURS.items()]


def _published_over_time(measure: str) -> list[Line]:
    return [
        Line(*_MODELS[curve.model], {epoch: [value] for epoch, value in curve.points.items()}, "--")
        for curve in targets()["cifar100"].curves
        if curve.measure == measure and curve.split == "train"
    ]


def _published_weights(measure: str) -> list[Line]:
    if measure != "weight_gap":
        return _published_over_time(measure)
    return [Line(*_MODELS[model], {epoch: [value] for epoch, value in points.items()}, "--")
            for model, points in (("nscl", _GAP), ("supcon", _GAP_SCL))]  # fmt: skip


def _ends(rows: Sequence[Row], key: str, data: str, measure: str) -> list[Line]:
    """NSCL of both families and the rerun at the end of training, by a swept key; two classes stand apart."""
    pairs = [(_FAMILIES[family], pair) for family, pair in FAMILIES.items()] + [(_FLOOR, (PAPER[0], RESEEDED))]
    found = []
    for name in (f"{data}-{key}", f"{data}-two-{key}"):
        mine = _last(having(rows, experiment=name))
        found += [Line(*look, _points(mine, key, pair, measure)) for look, pair in pairs]
    return found


def _published_ends(key: str, measure: str) -> list[Line]:
    def place(target: Target) -> tuple[str, float]:
        return target.data, target.classes if key == "classes" else target.config().train.temperature

    found = _published({"classes": "Fig. 3", "temperature": "Fig. 4"}[key], measure, EPOCH, place)
    if key == "classes":
        found["cifar10"] = {classes: [value] for classes, value in _CIFAR10[measure].items()}
    return [Line(*_SETS[data], points, "--") for data, points in found.items()]


def _batches(rows: Sequence[Row], measure: str) -> list[Line]:
    mine = _last([row for row in rows if row.rule])
    found = [Line(*look, _points(having(mine, rule=rule), "batch", PAPER, measure)) for rule, look in _RULES.items()]
    label, colour, marker = _FLOOR
    points = _points(having(mine, rule="sqrt"), "batch", (PAPER[0], RESEEDED), measure)
    return [*found, Line(f"{label}, square root", colour, marker, points)]


def _published_batches(measure: str) -> list[Line]:
    def place(target: Target) -> tuple[str, float]:
        return next(rule for rule in _RULES if f"-{rule}-" in target.name), target.config().train.batch_size

    found = _published("Fig. 5", measure, LATE, place)
    return [Line(*look, found.get(rule, {}), "--") for rule, look in _RULES.items()]


def _published(
    figure: str, measure: str, epoch: int, place: Callable[[Target], tuple[str, float]]
) -> dict[str, dict[float, Sequence[float]]]:
    """The published alignment of NSCL with CL on training images; `place`: the line of a point, and its x."""
    found: dict[str, dict[float, Sequence[float]]] = {}
    for target in targets().values():
        curve = target.curve(measure, "nscl", "train") if target.figure == figure else None
        if curve is not None and (value := curve.at(epoch)) is not None:
            line, x = place(target)
            found.setdefault(line, {})[x] = [value]
    return found


def _last(rows: Sequence[Row]) -> list[Row]:
    """The rows of the last evaluation of each run."""
    ends: dict[tuple[object, ...], int] = {}
    for row in rows:
        ends[row.run] = max(row.epoch, ends.get(row.run, 0))
    return [row for row in rows if row.epoch == ends[row.run]]


def _points(rows: Sequence[Row], x: str, pair: tuple[str, str], measure: str) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for row in having(rows, model=pair[0], other=pair[1]):
        if (value := getattr(row, measure)) is not None:
            found.setdefault(getattr(row, x), []).append(value)
    return found
