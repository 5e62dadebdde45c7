"""The figures of a report as inline SVG: one colour and one marker per model through all of them."""

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from textwrap import fill

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastcl.report.records import IDENTITY, PAIR_MEASURES, RESEEDED, Run, Series, known

# Okabe and Ito's palette for colour-blind readers, without black (ink) and yellow (too pale on white).
REFERENCE_COLOUR = "#0072B2"
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("s", "^", "D", "v", "P", "X", "<")
FLOOR_COLOUR = "#808080"
FLOOR_BAND = {"facecolor": FLOOR_COLOUR, "alpha": 0.25, "linewidth": 0}

# The SVG names two colours that the page decides on (light, dark, print): stand-ins that nothing else uses.
INK, GRID = "#010203", "#040506"
PAGE_COLOURS = {INK: "var(--ink)", GRID: "var(--grid)"}

STYLE = {
    "svg.hashsalt": "fastcl",  # element ids, and so the bytes of the page, depend on the content alone
    "svg.fonttype": "none",  # text stays text; DejaVu Sans sets the room, browsers put narrower letters in its place
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9.0,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # a factor or an offset above the axis would run into the panel's title
    "axes.formatter.limits": (-9, 9),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
WIDTH = 11.5  # inches: 1104 CSS pixels


@dataclass(frozen=True)
class Plate:
    """One figure of the report; the caption may name {reference} and {chance}, ``band`` explains the noise floor."""

    name: str
    title: str
    caption: str
    draw: Callable[[Run], Figure]
    band: str = ""


def svg(plate: Plate, run: Run) -> str:
    """The figure as an SVG element to be put into an HTML (or XHTML) page; the same run gives the same bytes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the page
        matplotlib.rcParams.update(STYLE)
        plate.draw(run).savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(plate.title)}" ', 1)
    return re.sub(r"<[^<>]+>", lambda tag: _for_page(tag[0], plate.name), text)


def _for_page(tag: str, name: str) -> str:
    """Ids are unique per figure only: on a page with several each gets its figure's name."""
    tag = tag.replace(' id="', f' id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for stand_in, colour in PAGE_COLOURS.items():
        tag = tag.replace(stand_in, colour)
    return tag


def _look(run: Run, model: str) -> dict[str, object]:
    if model == run.reference:
        return {"color": REFERENCE_COLOUR, "marker": "o", "linewidth": 2.4, "zorder": 2.5}
    if model == IDENTITY:
        return {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1.0, "zorder": 3.5}
    if model == RESEEDED:
        return {"color": FLOOR_COLOUR, "marker": ".", "linewidth": 1.2, "zorder": 2.2}
    at = run.others.index(model)
    return {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)], "zorder": 3.0}


def _label(run: Run, model: str) -> str:
    notes = {run.reference: "reference", IDENTITY: "= reference", RESEEDED: "other views"}
    return f"{model} ({notes[model]})" if model in notes else model


def _curve(ax: Axes, run: Run, model: str, series: Series, measure: str, above: float = -math.inf) -> None:
    epochs = sorted(series)
    found = [series[epoch][measure] for epoch in epochs]
    values = [value if known(value) and value > above else math.nan for value in found]
    # markers that touch each other would hide the line: at most 30 a line, the last evaluation among them
    step = max(1, math.ceil(len(epochs) / 30))
    ax.plot(epochs, values, markevery=((len(epochs) - 1) % step, step), **_look(run, model))


def _panels(run: Run, titles: list[str], unit: str, rows: int = 1, **shared: bool) -> tuple[Figure, list[Axes]]:
    columns = math.ceil(len(titles) / rows)
    figure = Figure(figsize=(WIDTH, 0.65 + 2.75 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for spare in axes[len(titles) :]:
        spare.remove()
    axes = axes[: len(titles)]
    first = run.epochs[0]
    last = max(run.epochs[-1], first + 1)
    pad = 0.03 * (last - first)
    for at, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        ax.set_title(fill(title, int(10 * WIDTH / columns)))  # about 10 letters an inch
        ax.set_xlim(first - pad, last + pad)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True))
        ax.set_xlabel("completed epochs")
        if at % columns == 0:
            ax.set_ylabel(unit)
    return figure, axes


def _finish(figure: Figure, run: Run, models: list[str], extra: tuple[Patch, ...] = ()) -> Figure:
    """Mark empty panels and put one legend below all panels, where it covers nothing."""
    for ax in figure.axes:
        if not any(known(y) for line in ax.lines for y in line.get_ydata()):
            ax.text(0.5, 0.5, "no values", transform=ax.transAxes, ha="center", va="center")
            ax.set_yticks([])
    handles = [Line2D([], [], label=_label(run, model), **_look(run, model)) for model in models] + list(extra)
    if not handles:
        return figure
    labels = [handle.get_label() for handle in handles]
    widths = [0.6 + 0.08 * len(label) for label in labels]  # inches, generously
    columns = len(labels) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    further_rows = math.ceil(len(labels) / columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.18 * further_rows)  # not at the panels' cost
    return figure


def _against_reference(run: Run, measures: list[str], perfect: float, unit: str) -> Figure:
    """One panel per measure: every other model's value against the reference, over the band of the noise floor."""
    models = [model for model in run.models if model != run.reference]
    figure, axes = _panels(run, [PAIR_MEASURES[m] for m in measures], unit, sharey=True)
    for ax, measure in zip(axes, measures, strict=True):
        for model in models:
            _curve(ax, run, model, run.pair_series(run.reference, model), measure)
        floor = run.pair_series(run.reference, RESEEDED) if RESEEDED in models else {}
        known_floor = {e: floor[e][measure] for e in sorted(floor) if known(floor[e][measure])}
        ax.fill_between(list(known_floor), list(known_floor.values()), perfect, **FLOOR_BAND)
    label = "noise floor: no farther than reseeded"
    band = Patch(**FLOOR_BAND, label=label)
    return _finish(figure, run, models, (band,) if RESEEDED in models else ())


def alignment(run: Run) -> Figure:
    """CKA, debiased CKA and RSA with the reference over epochs."""
    return _against_reference(run, ["cka", "cka_debiased", "rsa"], 1.0, "alignment (1 = same)")


def weight_gap(run: Run) -> Figure:
    """Weight gap to the reference over epochs."""
    return _against_reference(run, ["weight_gap"], 0.0, "relative distance (0 = same)")


def training_losses(run: Run) -> Figure:
    """One panel per objective; the controls share the reference's."""
    objectives = [run.reference, *run.others]
    figure, axes = _panels(run, objectives, "own training loss (nats)", rows=math.ceil(len(objectives) / 4))
    for ax, objective in zip(axes, objectives, strict=True):
        controls = [m for m in (RESEEDED, IDENTITY) if m in run.models and objective == run.reference]
        for model in (objective, *controls):
            _curve(ax, run, model, run.per_model.get(model, {}), "loss")
    return _finish(figure, run, list(run.models))


def _per_model(
    run: Run, measures: dict[str, str], unit: str, rows: int = 1, above: float = -math.inf, **shared: bool
) -> Figure:
    figure, axes = _panels(run, list(measures.values()), unit, rows, **shared)
    for ax, measure in zip(axes, measures, strict=True):
        for model in run.models:
            _curve(ax, run, model, run.per_model.get(model, {}), measure, above)
    return _finish(figure, run, list(run.models))


def contrastive_losses(run: Run) -> Figure:
    """DCL and NSCL of every model's embeddings on the same batches, their gap and the same-class softmax mass."""
    panels = {
        "dcl_loss": "DCL (self-supervised) loss",
        "nscl_loss": "NSCL (supervised) loss",
        "loss_gap": "loss gap: DCL minus NSCL",
        "same_class_mass": "softmax mass on the same class",
    }
    figure = _per_model(run, panels, "", rows=2)
    for ax, unit in zip(figure.axes, ("loss (nats)", "loss (nats)", "gap (nats)", "fraction of the mass"), strict=True):
        ax.set_ylabel(unit)
    return figure


def accuracy(run: Run) -> Figure:
    """Nearest-class-centre accuracy on both splits."""
    return _per_model(run, {"ncc_train": "train", "ncc_test": "test"}, "accuracy (fraction correct)", sharey=True)


def collapse(run: Run) -> Figure:
    """CDNV and directional CDNV on log scales."""
    measures = {"cdnv": "CDNV", "cdnv_directional": "directional CDNV"}
    figure = _per_model(run, measures, "variance / distance² (log scale)", above=0.0)
    for ax in figure.axes:
        if ax.get_yticks().size:
            _log_axis(ax)
    return figure


def _log_axis(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = math.log10(high / low)
    if decades > 0.7:
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if decades > 2.5 else (1, 2, 5)))
    else:  # a range that may hold no round number of a decade
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


PLATES = (
    Plate(
        "alignment",
        "Alignment with the reference",
        "How alike the encoder outputs of two models are on the same held-out images: linear CKA as usually computed "
        "(biased: with few samples for the number of features even unrelated models score high), CKA without that "
        "bias, and RSA (the Pearson correlation of the pairwise cosine similarities). Each line compares one model "
        "with {reference}; markers sit at evaluations. All models start from the same weights, hence 1 at epoch 0.",
        alignment,
        " The grey band reaches from the reseeded twin to 1.",
    ),
    Plate(
        "weight-gap",
        "Weight gap to the reference",
        "How far the encoders' weights are apart, relative to their size (mean over weight tensors). Models may be "
        "alike in what they represent and still lie far apart here.",
        weight_gap,
        " The grey band reaches from 0 to the gap of the reseeded twin: weights part even where the loss is the same.",
    ),
    Plate(
        "training-losses",
        "Training losses",
        "What each model minimises, as the mean over the batches of an epoch (so there is none at epoch 0). These are "
        "different objectives: read the trend within a panel, do not compare heights between panels.",
        training_losses,
    ),
    Plate(
        "contrastive-losses",
        "The self-supervised and the supervised contrastive loss on the same batches",
        "Both losses computed from the embeddings of every model, on the same batches, whatever that model trains on. "
        "DCL repels all other images, NSCL only those of other classes; their gap is what the labels change. The "
        "softmax mass on the same class is the share of the repulsion that DCL spends on images of the anchor's own "
        "class.",
        contrastive_losses,
    ),
    Plate(
        "accuracy",
        "Accuracy of the nearest class centre",
        "Images are assigned to the class with the nearest mean representation; the means come from the training "
        "images in both panels. Guessing would reach about {chance}.",
        accuracy,
    ),
    Plate(
        "cdnv",
        "Class-distance normalised variance",
        "Variance within classes over the squared distance between class means, averaged over pairs of classes, on "
        "the held-out images: lower means tighter, better separated classes. The directional version counts only the "
        "variance along the line between the two means. Values that are zero or not defined are left out.",
        collapse,
    ),
)
