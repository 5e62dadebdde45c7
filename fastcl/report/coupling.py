"""How far the similarities of two models drift apart, compared with the theorems of arXiv 2510.08852."""

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastcl.errors import FastclError
from fastcl.report.drawing import INK, Plate, finish, log_axis, look, panels
from fastcl.report.run import CERTIFICATE_MEASURES, STEP_MEASURES, Number, Run, Series, known
from fastcl.theory import CouplingBound, largest_drift, similarity_coupling_bound

THEOREM_PAIR = {"dcl", "nscl"}  # the theorem's CL and NSCL
# Colours that no model uses, light enough for a dark page.
STYLES = {"cka": ("#7b4fd0", "-"), "cka_debiased": ("#a3742c", (0, (4, 2))), "rsa": ("#8a8f98", (0, (1, 1)))}
DRAWN = 1000  # maximum number of points per line
FAINTEST = 1e-6  # share of the largest drift below which nothing is drawn

CERTIFICATES = (
    "Drift is the distance between the two models' cosine similarities of all held-out images, as a fraction of the "
    "largest possible distance; ρ and r measure it relative to the spread of the reference's similarities. ρ and r "
    "imply lower bounds on CKA and RSA (Corollaries 1 and 2 of arXiv 2510.08852); where ρ or r reaches 1, the bounds "
    "are 0 and -1 and say nothing. Here CKA compares cosine similarities, as in the paper's text; the table above "
    "compares the features themselves, as in its code."
)


def theorem(run: Run) -> CouplingBound | None:
    """Theorem 1 for the run's steps; None if it does not cover this pair or the run lacks a number it needs."""
    pair, series = _measured(run)
    train = run.config["train"]
    if set(pair) != THEOREM_PAIR or sorted(series) != list(range(len(series))):
        return None
    rates = [series[step]["lr"] for step in range(len(series))]
    try:
        return similarity_coupling_bound(
            rates, train.get("batch_size"), train.get("temperature"), run.data.get("largest_class"), n=_rows(run)
        )
    except FastclError:
        return None


def certificates(run: Run) -> tuple[list[str], dict[str, list[Number]]]:
    """The header, and per model the CERTIFICATE_MEASURES against the reference at the last epoch, drift as a share of
    the largest; models without a recorded drift have no row."""
    images = run.data.get("test")
    largest = largest_drift(images) if isinstance(images, int) and images > 1 else math.nan
    rows = {}
    for model in run.models:
        values = [run.pair_value(run.reference, model, measure) for measure in CERTIFICATE_MEASURES]
        if known(values[0]):
            rows[f"{run.reference} – {model}"] = [values[0] / largest, *values[1:]]
    return ["pair", *CERTIFICATE_MEASURES.values()], rows


def drift(run: Run) -> Figure:
    """Per step: the drift with the theorem's line, and the alignment of the loss embeddings."""
    pair, series = _measured(run)
    figure, axes = panels(run, ["drift of the similarities", "alignment of the loss embeddings"], "")
    steps = _thinned(sorted(series))
    colours = look(run, pair[1])
    handles = [Line2D([], [], label=f"left: {pair[1]} and {pair[0]}, measured", color=colours["color"])]
    shares = [_share(series[step]["drift"], run) for step in steps]
    dot: dict[str, Any] = {"marker": "o"} if len(steps) == 1 else {}  # one step makes no line
    axes[0].plot(steps, shares, color=colours["color"], **dot)
    shown = [share for share in shares if known(share)]
    bound = theorem(run)
    if bound is not None:
        shares = [_visible(10 ** (bound.log10[step] - bound.log10_largest)) for step in steps]
        axes[0].plot(steps, shares, color=INK, linestyle="--", linewidth=1.2, **dot)
        name = "left: Theorem 1 for similarity descent (not a bound on this run)"
        handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=1.2, label=name))
        shown += [share for share in shares if known(share)]
    for measure, (colour, style) in STYLES.items():
        values = [value if known(value := series[step][measure]) else math.nan for step in steps]
        given: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.2}
        axes[1].plot(steps, values, **given, **dot)
        handles.append(Line2D([], [], label=f"right: {STEP_MEASURES[measure]}", **given))
    if shown:
        axes[0].set_ylim(min(shown) / 1.3, 1.5)
        log_axis(axes[0])
    for ax, unit in zip(axes, ("fraction of the largest drift (log scale)", "alignment (1 = same)"), strict=True):
        ax.set_xlim(0, max(1, *steps))
        ax.set_xlabel("training steps")
        ax.set_ylabel(unit)
    return finish(figure, run, [], handles)


def remark(run: Run) -> str:
    """What the theorem says about this run and what it does not; begins with a space."""
    bound = theorem(run)
    if bound is None:
        return (
            " Theorem 1 of arXiv 2510.08852 is not drawn: it covers the pair dcl and nscl and needs the run's learning "
            "rates, batch size, temperature and class frequencies."
        )
    _, series = _measured(run)
    drifts = [series[step]["drift"] for step in range(len(series))]
    above = sum(known(d) and d > 0 and math.log10(d) > b for d, b in zip(drifts, bound.log10, strict=False))
    return " ".join(
        [
            f" The dashed line is not a bound on this run: the drift is above it at {above:,} of {len(series):,} "
            "steps. It is the bound of Theorem 1 of arXiv 2510.08852, with this run's learning rates, batch size, "
            "temperature and class frequencies, for gradient descent on the similarities themselves (similarity "
            "descent). Descent on a network's weights changes them by other amounts, as do LARS, momentum and AdamW.",
            *_vacuity(bound, len(series)),
        ]
    )


def _vacuity(bound: CouplingBound, steps: int) -> list[str]:
    """Sentences on where the theorem is vacuous even for similarity descent."""
    found = []
    if bound.log10_gap > math.log10(2):
        delta = "not defined" if math.isinf(bound.log10_gap) else f"10^{bound.log10_gap:.1f}"
        found.append(
            f"Its Delta, a bound on the difference of the two losses' softmax weights, is {delta} for this batch size, "
            "temperature and largest class; since 2 is always a bound, the line is drawn with 2."
        )
    start = bound.vacuous_from
    if start is not None and start < steps:
        found.append(f"From step {start:,} on it is vacuous: it exceeds the largest drift.")
    if math.isfinite(bound.log10_printed):
        share = bound.log10_printed - bound.log10_largest
        found.append(f"The closed form in the paper gives 10^{share:.1f} times the largest drift after the last step.")
    return found


def _measured(run: Run) -> tuple[tuple[str, str], Series]:
    """The pair whose steps were recorded, reference first if it is one of them, and its records."""
    pair, series = next(iter(run.steps.items()))
    return (pair if pair[0] == run.reference else pair[::-1]), series


def _rows(run: Run) -> int | None:
    """Rows of a batch's similarity matrices: two views per sample."""
    size = run.config["train"].get("batch_size")
    return 2 * size if type(size) is int and size > 0 else None


def _share(value: Number, run: Run) -> float:
    return _visible(value / largest_drift(_rows(run))) if known(value) else math.nan


def _visible(share: float) -> float:
    return share if share >= FAINTEST else math.nan


def _thinned(steps: list[int]) -> list[int]:
    """At most DRAWN evenly spaced steps, including the last."""
    every = math.ceil(len(steps) / DRAWN)
    return steps[(len(steps) - 1) % every :: every]


DRIFT = Plate(
    "drift",
    "Drift of the similarities per step, and Theorem 1",
    "Left: the distance between the two models' cosine similarities of the same batch, before each update, as a "
    "fraction of the largest possible distance (0.1 is a tenth of it). The models start equal, so the drift starts at "
    "0. Right: how well the same similarities agree. Both use the embeddings passed to the loss, not the encoder "
    "outputs of the other figures; at most 1,000 steps are drawn.",
    drift,
    note=remark,
    shown=lambda run: bool(run.steps) and _rows(run) is not None,
)
