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
    band = Patch(**FLOOR_BAND, label="noise floor: as close as the reseeded twin")
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
        "How similar the encoder outputs of two models are on the same held-out images: linear CKA as usually computed "
        "(biased: with few samples relative to the number of features, even unrelated models score high), debiased "
        "CKA, and RSA (the Pearson correlation of the pairwise cosine similarities). Each line compares one model with "
        "{reference}; markers are evaluations. All models start from the same weights, so the curves start at 1.",
        alignment,
        " The grey band extends from the reseeded twin to 1.",
    ),
    Plate(
        "weight-gap",
        "Weight gap to the reference",
        "Distance between the encoders' weights, relative to their size (mean over weight tensors). Models can have "
        "similar representations and still be far apart here.",
        weight_gap,
        " The grey band extends from 0 to the gap of the reseeded twin: weights diverge even under the same loss.",
    ),
    Plate(
        "every-pair",
        "Alignment of every pair",
        "Debiased CKA of each model with each of the others, one panel per model; the panel of {reference} repeats "
        "the figure above.",
        every_pair,
    ),
    DRIFT,
    Plate(
        "training-losses",
        "Training losses",
        "The loss that each model minimises, averaged over the batches of an epoch (so there is none at epoch 0). The "
        "objectives differ: read the trend within a panel, but do not compare values between panels.",
        training_losses,
    ),
    Plate(
        "contrastive-losses",
        "The self-supervised and the supervised contrastive loss on the same batches",
        "Both losses computed from the embeddings of every model on the same batches, whatever its training loss. DCL "
        "repels all other images, NSCL only those of other classes; their gap is the effect of the labels. The softmax "
        "mass on the same class is the fraction of DCL's repulsion that acts on images of the anchor's own class.",
        contrastive_losses,
    ),
    Plate(
        "accuracy",
        "Accuracy of the nearest class centre",
        "Images are assigned to the class with the nearest mean representation; in both panels the means come from "
        "the training images. Chance level is about {chance}.",
        accuracy,
    ),
    Plate(
        "cdnv",
        "Class-distance normalised variance",
        "Variance within classes divided by the squared distance between class means, averaged over pairs of classes, "
        "on the held-out images: lower means tighter, better separated classes. The directional version uses only the "
        "variance along the line between the two means. Values that are zero or undefined are left out.",
        collapse,
    ),
)
