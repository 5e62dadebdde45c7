"""All probes with their settings, one after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from fastcl.checks import check_seed
from fastcl.errors import FastclError, brief, suggest
from fastcl.evaluation.few_shot import REPEATS, check_repeats, few_shot_probe, shot_counts
from fastcl.evaluation.findings import Evaluation, NCCProbe
from fastcl.evaluation.frozen import FrozenFeatures, frozen_features
from fastcl.evaluation.linear import HELD_OUT, PENALTIES, linear_probe
from fastcl.evaluation.nearest import TEMPERATURE, knn_probe, neighbour_counts
from fastcl.metrics import ncc_accuracy


@dataclass(frozen=True)
class ProbeSettings:
    """Settings of all probes; what they mean is said at `linear_probe`, `knn_probe` and `few_shot_probe`."""

    penalties: tuple[float, ...] = PENALTIES
    held_out: float = HELD_OUT
    k: tuple[int, ...] | None = None
    temperature: float = TEMPERATURE
    shots: tuple[int, ...] | None = None
    repeats: int = REPEATS
    seed: int = 0


class Probe(NamedTuple):
    """`run` measures features, `settings` names those of ProbeSettings that it takes, `seeded` says that it draws
    samples by their ids."""

    run: Callable[..., Any]
    settings: tuple[str, ...] = ()
    seeded: bool = False


def ncc_probe(train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor) -> NCCProbe:
    """`fastcl.metrics.ncc_accuracy` on both splits, which also says what it raises."""
    train = ncc_accuracy(train_features, train_labels, train_features, train_labels)
    return NCCProbe(train, ncc_accuracy(train_features, train_labels, features, labels))


# By the field of Evaluation.
_PROBES = {
    "linear": Probe(linear_probe, ("penalties", "held_out", "seed"), seeded=True),
    "ncc": Probe(ncc_probe),
    "knn": Probe(knn_probe, ("k", "temperature")),
    "few_shot": Probe(few_shot_probe, ("shots", "repeats", "seed"), seeded=True),
}
PROBES = tuple(_PROBES)


def evaluate(
    train_features: Tensor, train_labels: Tensor, features: Tensor, labels: Tensor, *, ids: Tensor | None = None,
    probes: Sequence[str] = PROBES, settings: ProbeSettings = ProbeSettings(),
) -> Evaluation:  # fmt: skip
    """Probe one model's frozen features. No label of the test split is used to fit or to choose anything.

    Args:
        train_features: (n, d), any floating dtype; probes compute in float64 on their device.
        train_labels: (n,) integers.
        features: (m, d) of the test split.
        labels: (m,) integers. Rows with a label that no training row has count as wrong (`Evaluation.unseen`).
        ids: (n,) distinct integers that name the training samples; None: the numbers of the rows. With the same ids,
            labels and seed, all models are given the same draws.
        probes: names of PROBES.
        settings: of the probes.

    Raises:
        FastclError: an unknown probe, or whatever the probes refuse.
    """
    check_probes(probes)
    data = frozen_features(train_features, train_labels, features, labels, ids)
    found = begun(data)
    for name in probes:
        found = with_probe(found, name, data, settings)
    return found


def begun(data: FrozenFeatures) -> Evaluation:
    """An evaluation without a probe: the shapes and the labels that were not seen."""
    return Evaluation(
        train_rows=len(data.train), test_rows=len(data.test), width=data.train.shape[1], classes=len(data.labels),
        unseen=data.unseen, unseen_rows=int((data.test_index < 0).sum()),
    )  # fmt: skip


def with_probe(evaluation: Evaluation, name: str, data: FrozenFeatures, settings: ProbeSettings) -> Evaluation:
    """The evaluation with the result of one probe of PROBES."""
    probe = _PROBES[name]
    more: dict[str, Any] = {key: getattr(settings, key) for key in probe.settings}
    if probe.seeded:
        more["ids"] = data.ids
    result = probe.run(data.train, data.train_labels, data.test, data.test_labels, **more)
    return dataclasses.replace(evaluation, **{name: result})


def settings_of(name: str, settings: ProbeSettings) -> dict[str, Any]:
    """Those settings that the result of a probe of PROBES depends on, as JSON has them."""
    values = ((key, getattr(settings, key)) for key in _PROBES[name].settings)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values}


def check_settings(settings: ProbeSettings, train_labels: Tensor) -> None:
    """Refuse, before any features are there, what the probes would refuse for these (n,) integer labels."""
    check_seed(settings.seed)
    check_repeats(settings.repeats)
    neighbour_counts(settings.k, len(train_labels))
    shot_counts(settings.shots, train_labels)


def check_probes(names: Sequence[str]) -> None:
    """Raise FastclError unless these are names of PROBES."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise FastclError(f"probes must be a list of names, got {brief(names)}")
    for name in names:
        if not isinstance(name, str) or name not in _PROBES:
            raise FastclError(f"unknown probe {brief(name)}{suggest(str(name), _PROBES)}")
    if not names:
        raise FastclError(f"no probe is named; there are {', '.join(_PROBES)}")
