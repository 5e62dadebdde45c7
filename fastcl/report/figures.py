"""The figures of a report."""

import math

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastcl.report.coupling import DRIFT
from fastcl.report.drawing import FLOOR_BAND, Plate, curve, finish, log_axis, panels
from fastcl.report.run import IDENTITY, PAIR_MEASURES, RESEEDED, Run, known


def _against_reference(run: Run, measures: list[str], perfect: float, unit: str) -> Figure:
    """One panel per measure: every other model against the reference, with the band of the noise floor."""
    models = [model for model in run.models if model != run.reference]
    figure, axes = panels(run, [PAIR_MEASURES[m] for m in measures], unit, sharey=True)
    for ax, measure in zip(axes, measures, strict=True):
        for model in models:
            curve(ax, run, model, run.pair_series(run.reference, model), measure)
        floor = run.pair_series(run.reference, RESEEDED) if RESEEDED in models else {}
        known_floor = {e: floor[e][measure] for e in sorted(floor) if known(floor[e][measure])}
        ax.fill_between(list(known_floor), list(known_floor.values()), perfect, **FLOOR_BAND)
    band = Patch(**FLOOR_BAND, label="noise floor: no farther than reseeded")
    return finish(figure, run, models, (band,) if RESEEDED in models else ())


def alignment(run: Run) -> Figure:
    """CKA, debiased CKA and RSA with the reference over epochs."""
    return _against_reference(run, ["cka", "cka_debiased", "rsa"], 1.0, "alignment (1 = same)")


def weight_gap(run: Run) -> Figure:
    """Weight gap to the reference over epochs."""
    return _against_reference(run, ["weight_gap"], 0.0, "relative distance (0 = same)")


def every_pair(run: Run) -> Figure:
    """Debiased CKA over epochs: one panel per model, with a line for each of the others."""
    models = [model for model in run.models if model not in (IDENTITY, RESEEDED)]
    figure, axes = panels(run, models, "debiased CKA (1 = same)", rows=math.ceil(len(models) / 4), sharey=True)
    for ax, model in zip(axes, models, strict=True):
        for other in models:
            if other != model:
                curve(ax, run, other, run.pair_series(model, other), "cka_debiased")
    return finish(figure, run, models)


def training_losses(run: Run) -> Figure:
    """One panel per objective; the controls are drawn in the reference's panel."""
    objectives = [run.reference, *run.others]
    figure, axes = panels(run, objectives, "own training loss (nats)", rows=math.ceil(len(objectives) / 4))
    for ax, objective in zip(axes, objectives, strict=True):
        controls = [m for m in (RESEEDED, IDENTITY) if m in run.models and objective == run.reference]
        for model in (objective, *controls):
            curve(ax, run, model, run.per_model.get(model, {}), "loss")
    return finish(figure, run, list(run.models))


def _per_model(
    run: Run, measures: dict[str, str], unit: str, rows: int = 1, above: float = -math.inf, **shared: bool
) -> Figure:
    figure, axes = panels(run, list(measures.values()), unit, rows, **shared)
    for ax, measure in zip(axes, measures, strict=True):
        for model in run.models:
            curve(ax, run, model, run.per_model.get(model, {}), measure, above)
    return finish(figure, run, list(run.models))


def contrastive_losses(run: Run) -> Figure:
    """DCL and NSCL of every model's embeddings on the same batches, their gap and the same-class softmax mass."""
    measures = {
        "dcl_loss": "DCL (self-supervised) loss",
        "nscl_loss": "NSCL (supervised) loss",
        "loss_gap": "loss gap: DCL minus NSCL",
        "same_class_mass": "softmax mass on the same class",
    }
    figure = _per_model(run, measures, "", rows=2)
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
            log_axis(ax)
    return figure


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
        "every-pair",
        "Alignment of every pair",
        "Debiased CKA of each model, one panel each, with each of the others; the panel of {reference} repeats the "
        "figure above.",
        every_pair,
    ),
    DRIFT,
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
