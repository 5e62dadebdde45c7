"""The section of a report on probes of frozen features, where `fastcl eval` has measured them."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fastcl.io.run_names import EVALUATION
from fastcl.report.drawing import Plate, finish, look, panels
from fastcl.report.run import Run

_ABOUT = (
    "Simple classifiers fitted on the features of the training images, with the encoders as they were after {epochs}; "
    "no label of a held-out image was used. Linear probe: multinomial logistic regression, its penalty chosen on held-"
    "out training images. Nearest neighbours by cosine, with one vote each (majority) or a vote that grows with the "
    "similarity (weighted); a training image is not its own neighbour. Shots: so many training images of each class, "
    "the same ones for every model; mean over draws ± half the 95 % interval by Student's t, which covers the draw of "
    "the images, but neither other held-out images nor another training."
)
_OLDER = " The run has gone on since then: fastcl eval measures it anew."
_TITLES = {"ncc": "nearest centre", "linear": "linear probe"}


def read_evaluations(run: Run) -> dict[str, Any]:
    """The `ModelRecord` of each model of the run that has one, in the run's order.

    Raises:
        FastclError: evaluation.json cannot be read or is not one.
    """
    path = run.path / EVALUATION
    if not path.is_file():
        return {}
    from fastcl.evaluation.record import read_record  # loads torch, which no other part of a report needs

    found = read_record(path) or {}
    return {model: found[model] for model in run.models if model in found}


def about(run: Run) -> str:
    """What the section shows, in sentences."""
    epochs = sorted({record.epoch for record in read_evaluations(run).values() if record.epoch is not None})
    text = ", ".join(map(str, epochs)) + (" epoch" if epochs == [1] else " epochs")
    return _ABOUT.format(epochs=text) + (_OLDER if epochs and epochs[0] < run.last_epoch else "")


def few_shots(run: Run) -> Figure:
    """Accuracy on held-out images against the number of shots: one panel per classifier, one line per model."""
    records = read_evaluations(run)
    figure, axes = panels(run, list(_TITLES.values()), "accuracy (fraction correct)", sharey=True)
    shots = sorted({few.shots for record in records.values() for few in record.evaluation.few_shot})
    for ax, classifier in zip(axes, _TITLES, strict=True):
        for at, (model, record) in enumerate(records.items()):
            found = [few for few in record.evaluation.few_shot if few.classifier == classifier]
            apart = 1.02 ** (at - (len(records) - 1) / 2)  # so that bars do not hide each other
            ax.errorbar(
                [few.shots * apart for few in found], [few.test.mean for few in found],
                [few.test.interval or 0.0 for few in found], capsize=2, elinewidth=0.9, **look(run, model),
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlim(shots[0] / 1.2, shots[-1] * 1.2)
        ax.xaxis.set_major_locator(FixedLocator(shots))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("training images of each class (log scale)")
    return finish(figure, run, list(records))


FEW_SHOTS = Plate(
    "few-shots",
    "Accuracy with few shots",
    "Held-out images classified from a few training images of each class: by the nearest of the class centres, and by "
    "a linear probe. Bars are the 95 % intervals over draws. Chance level is about {chance}.",
    few_shots,
    shown=lambda run: any(record.evaluation.few_shot for record in read_evaluations(run).values()),
)
