"""The share of a training step spent waiting for data: one short training run per renderer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from bench.data.inputs import Case, Photos
from bench.data.providers import PROVIDERS
from bench.harness.command import ROOT
from bench.harness.records import Record, record
from bench.harness.suite import Run
from bench.training.run import SMALL
from fastcl.config.written import toml

SECTION = "training"
SIZE = {False: 96, True: 12}  # side of the views by args.tiny
LIMIT = 240  # seconds
EPOCHS = 2  # the first one warms up

# Name, options and batch of models large enough to keep a GPU busy, or small enough to finish in a minute on a CPU.
_MODELS = {"cuda": ("resnet50", {}, 256), "cpu": ("resnet18", {}, 32), "tiny": ("resnet18", SMALL, 4)}
_KEYS = ("epoch", "seconds", "images_per_second", "rendering_seconds")


def configuration(renderer: str, kind: str, case: Case, photos: Photos, device: torch.device) -> str:
    """The run as TOML: one model, two epochs; `kind` is a key of _MODELS."""
    name, options, batch = _MODELS[kind]
    tables = {
        "data": {"source": photos.source, "renderer": renderer, **({"classes": 4} if kind == "cpu" else {})},
        "views": {"preset": case.preset, "size": case.size},
        "model": {"name": name, "options": options, "cifar_stem": False, "hidden": 64, "projection": 32},
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"models": ["dcl"], "controls": [], "batch_size": batch, "epochs": EPOCHS, "eval_every": EPOCHS,
                  "device": device.type},
    }  # fmt: skip
    return "\n".join(f"{key} = {toml(table)}" for key, table in tables.items())


def measure(run: Run, case: Case, photos: Photos, scratch: Path) -> None:
    """Measure all renderers, with the folders of their runs in `scratch`, and print a line for each."""
    kind = "tiny" if run.args.tiny else run.device.type
    for provider in (p for p in PROVIDERS if p.renderer and p.name in run.args.providers):
        timing, reason = {}, provider.obstacle(photos, case, run.device)
        if not reason:
            text = configuration(provider.renderer, kind, case, photos, run.device)
            timing, reason = _train(text, scratch / f"training-{provider.renderer}")
            run.failed += [f"training: {provider.name}: {reason}"] if reason else []
        name, _, batch = _MODELS[kind]
        full = {"section": SECTION, "size": case.size, "source": photos.name, "preset": case.preset, "batch": batch,
                "model": name, **{key: timing.get(key) for key in _KEYS}}  # fmt: skip
        run.found.append(record(run.bench, provider.name, full, run.facts, reason=reason))
        share = reason or f"{100 * share_of(run.found[-1]):.1f} % of an epoch waits for views"
        print(f"training, {case}: {provider.name}: {share}", flush=True)


def share_of(r: Record) -> float:
    """The share of the last epoch spent waiting for views."""
    return r["rendering_seconds"] / r["seconds"]


def _train(text: str, folder: Path) -> tuple[dict[str, float], str | None]:
    """The last line of timing.jsonl, or why there is none. Uses a separate process: training sets global options."""
    path = folder.with_suffix(".toml")
    path.write_text(text, encoding="utf-8")
    command = (sys.executable, "-m", "fastcl", "train", str(path), "--out", str(folder))
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=LIMIT, **options)
    except subprocess.TimeoutExpired:
        return {}, f"over the limit of {LIMIT} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {}, f"failed: {last.removeprefix('error: ')}"
    return json.loads((folder / "timing.jsonl").read_text(encoding="utf-8").splitlines()[-1]), None
