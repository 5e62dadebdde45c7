"""Folders of runs with the settings of a published one, whose every number is known."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from small_runs import lines, model_line

from fastcl.config.tables import load_config
from fastcl.config.written import preset_file

FACTS = {"cifar100": ("CIFAR100", 100, 10_000), "mini-imagenet": ("mini-imagenet", 100, 12_000),
         "tiny-imagenet": ("tiny-imagenet", 200, 10_000), "imagenet-1k": ("imagenet-1k", 1000, 50_000),
         "cifar10": ("CIFAR10", 10, 10_000)}  # fmt: skip
PUBLISHED = 'train.models=["ntxent", "nscl_with_positive", "supcon", "ce"]'


def preset_run(
    path: Path,
    preset: str,
    curves: dict[str, dict[int, tuple[float | None, float | None]]],
    *overrides: str,
    **data: Any,
) -> Path:
    """A run of a preset with keys overridden.

    Args:
        path: its folder.
        preset: name of the preset.
        curves: model -> epoch -> CKA and RSA with the reference.
        overrides: "table.key=value".
        data: replaces facts about the data.
    """
    with preset_file(preset) as file:
        config = load_config(file, list(overrides))
    source, classes, test = FACTS[preset.removeprefix("vit-")]
    facts = {"source": source, "classes": classes, "train": 50_000, "test": test, "channels": 3} | data
    models = list(config.train.models)
    path.mkdir(parents=True)
    head = {
        "config": asdict(config), "seed": 0, "versions": {"fastcl": "0.2.0"}, "device": "cpu", "models": models,
        "reference": models[0], "data": facts,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(head))
    rows = []
    for epoch in sorted({epoch for series in curves.values() for epoch in series}):
        for model, series in curves.items():
            if epoch in series:
                cka, rsa = series[epoch]
                rows.append({"epoch": epoch, "pair": [models[0], model], "cka": cka, "rsa": rsa})
        rows += [model_line(epoch, model) for model in models]
    (path / "metrics.jsonl").write_text(lines(rows))
    return path
