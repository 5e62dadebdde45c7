"""Training runs and their results."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastcl
from bench.harness.records import Record
from fastcl.config.settings import Config
from fastcl.report import write_report
from fastcl.report.run import load_run
from fastcl.train import Lockstep
from fastcl.train.measures.evaluate import encode, evaluate
from fastcl.train.models import RESEEDED

ALIGNMENT = ("cka", "cka_debiased", "rsa")
_TENSORS = ("checkpoints", "features", "tensorboard", "weights")  # folders of a run that are large and not results


def train(config: Config, folder: Path) -> Record:
    """Train to the end and write the report. The folder is emptied first, and its tensors are removed at the end.

    Returns:
        pairs: by model, its ALIGNMENT with the reference. ncc, probe: by model, held-out accuracy of the nearest class
        centre and of a ridge classifier on standardised features of the training images. epoch_seconds,
        images_per_second: medians over the epochs, without evaluations. evaluation_seconds: time of one evaluation.
        peak_bytes: peak device memory; None on a CPU.
    """
    shutil.rmtree(folder, ignore_errors=True)
    on_card = torch.cuda.is_available() and config.train.device != "cpu"
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    run = Lockstep(config, folder)
    run.run()
    write_report(folder)
    for name in _TENSORS:
        shutil.rmtree(folder / name)
    found = load_run(folder)
    both = (run.inputs.train, run.inputs.test)
    began = perf_counter()
    evaluate(run.epoch, run.twins, *both, {})
    evaluation = perf_counter() - began  # evaluate ends with numbers on the host
    labels = [torch.from_numpy(views.split.labels) for views in both]
    features = [encode(run.twins, views) for views in both]
    reference, *others = found.models
    return {
        "pairs": {other: {name: found.pair_value(reference, other, name) for name in ALIGNMENT} for other in others},
        "ncc": {model: found.model_value(model, "ncc_test") for model in found.models},
        "probe": {t.name: ridge_accuracy(*(h[t.name].cpu() for h in features), *labels) for t in run.twins},
        "epoch_seconds": median(row["seconds"] for row in found.timing),
        "evaluation_seconds": evaluation,
        "images_per_second": median(row["images_per_second"] for row in found.timing),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_card else None,
    }


def compare(configs: dict[str, Config], folder: Path) -> Record:
    """Train the same run in two precisions.

    Args:
        configs: two configs by precision, each with a reseeded twin.

    Returns:
        floor: ALIGNMENT of the first run's reference with its reseeded twin. between: of the references in both
        precisions. alignment: by precision, of its reference with its second model.
    """
    features = {}
    for precision, config in configs.items():
        Lockstep(config, folder / precision).run()
        names = (*config.train.models[:2], RESEEDED)
        paths = [folder / precision / "features" / f"{name}.safetensors" for name in names]
        features[precision] = [load_file(path)["features"] for path in paths]
    (a, other, reseeded), (b, lowered, _) = features.values()
    first, second = features
    return {
        "floor": alignment(a, reseeded),
        "between": alignment(a, b),
        "alignment": {first: alignment(a, other), second: alignment(b, lowered)},
    }


def alignment(x: Tensor, y: Tensor) -> dict[str, float]:
    """ALIGNMENT of two models' features (n, d)."""
    linear, cosine = fastcl.pair_stats(x, y), fastcl.pair_stats(x, y, "cosine")
    return {"cka": linear.cka, "cka_debiased": linear.cka_debiased, "rsa": cosine.rsa}


def ridge_accuracy(x: Tensor, x_test: Tensor, labels: Tensor, labels_test: Tensor) -> float:
    """Accuracy on (m, d) features of scikit-learn's ridge classifier, fitted to (n, d) standardised features."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), RidgeClassifier())
    return float(probe.fit(x.numpy(), labels.numpy()).score(x_test.numpy(), labels_test.numpy()))
