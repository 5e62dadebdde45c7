"""Synthetic run directories whose every number is known, and readers of the page made from them."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from fastcl.report import write_report

SIX = ["dcl", "nscl", "supcon", "ce", "identity", "reseeded"]
DECAY = {"identity": 0.0, "reseeded": 0.01, "nscl": 0.008, "supcon": 0.06, "ce": 0.2}  # how fast each leaves dcl
XHTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


def pair_line(epoch: int, a: str, b: str) -> dict:
    decay = DECAY.get(a, 0.0) + DECAY.get(b, 0.0)
    cka = math.exp(-decay * epoch)
    return {
        "epoch": epoch,
        "pair": [a, b],
        "cka": cka,
        "cka_debiased": cka**1.1,
        "rsa": cka**1.3 if b != "nscl" else cka**2,  # by RSA nscl leaves the noise floor
        "weight_gap": 1.2 * (1 - math.exp(-4 * decay * epoch)),
    }


def certificate_values(epoch: int, a: str, b: str) -> dict:
    """What later versions add to a pair's line."""
    decay = DECAY.get(a, 0.0) + DECAY.get(b, 0.0)
    rho = math.sqrt(decay * epoch)
    return {
        "drift": 10 * rho, "rho": rho, "cka_cosine": 1 - rho / 4, "cka_bound": (1 - rho) / (1 + rho),
        "r": 2 * rho, "rsa_bound": -1.0 if rho >= 0.5 else (1 - 2 * rho) / (1 + 2 * rho),
    }  # fmt: skip


def step_line(step: int, a: str, b: str) -> dict:
    """One batch of 256 samples, so that the largest drift is 512 sqrt(2)."""
    cka = 1 - 0.01 * math.sqrt(step)
    values = {"drift": 4.0 * math.sqrt(step), "cka": cka, "cka_debiased": cka**1.1, "rsa": cka**2}
    return {"step": step, "epoch": step // 5, "pair": [a, b], **values, "lr": 0.2}


def model_line(epoch: int, model: str) -> dict:
    decay = DECAY.get(model, 0.0)
    first = epoch == 0
    dcl = 4.1 + 0.6 * math.exp(-0.3 * epoch) - decay
    return {
        "epoch": epoch,
        "model": model,
        "loss": None if first else 2.3 * math.exp(-0.4 * epoch) if model == "ce" else dcl,
        "dcl_loss": None if first else dcl,
        "nscl_loss": None if first else dcl - 0.1 - decay,
        "loss_gap": None if first else 0.1 + decay,
        "same_class_mass": None if first else 0.09 + decay,
        "ncc_train": 0.95 - 0.3 * math.exp(-0.5 * epoch - decay),
        "ncc_test": 0.93 - 0.3 * math.exp(-0.5 * epoch - decay),
        "cdnv": None if first else 0.2 + 0.9 * math.exp(-0.2 * epoch) - decay / 2,
        "cdnv_directional": 10 ** (-1 - 0.05 * epoch) + decay / 100,
    }


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_run(
    path: Path, models: Sequence[str] = SIX, epochs: int = 3, planned: int | None = None, timed: bool = True, **head
) -> Path:
    """A run evaluated after each of ``epochs`` of ``planned`` epochs; ``head`` replaces entries of run.json."""
    path.mkdir(parents=True, exist_ok=True)
    run = {
        "config": {
            "train": {
                "epochs": epochs if planned is None else planned, "batch_size": 256, "deterministic": True,
                "temperature": 0.5,
            },
            "views": {"preset": "digits", "crop": {"scale": [0.5, 1.0]}},
        },
        "seed": 17,
        "versions": {"fastcl": "0.1.0", "torch": "2.11.0"},
        "device": "cpu (2 threads)",
        "models": list(models),
        "reference": models[0],
        "data": {
            "source": "digits", "train": 1437, "test": 360, "classes": 10, "channels": 1, "size": 16,
            "largest_class": 0.1,
        },
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(run | head))
    rows = []
    for epoch in range(epochs + 1):
        rows += [pair_line(epoch, a, b) for a, b in combinations(models, 2)]
        rows += [model_line(epoch, model) for model in models]
    (path / "metrics.jsonl").write_text(lines(rows))
    if epochs > 0 and len(models) > 1:
        steps = [step_line(step, *models[:2]) for step in range(5 * epochs)]
        (path / "pairs.jsonl").write_text(lines(steps))
    if timed:
        times = [{"epoch": e, "seconds": 2.0, "images_per_second": 1000.0 + e} for e in range(1, epochs + 1)]
        (path / "timing.jsonl").write_text(lines(times))
    return path


def page_of(run: Path) -> ElementTree.Element:
    """The whole page as a tree: it parses only if every element, the inline figures too, is well formed."""
    return ElementTree.fromstring(write_report(run).read_text(encoding="utf-8"))


def text_of(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def tables_of(page: ElementTree.Element) -> list[dict[str, list[str]]]:
    """Every table as {first cell: other cells}, the head under its own first cell."""
    rows = [
        [[text_of(cell) for cell in row] for row in table.iter(f"{XHTML}tr")] for table in page.iter(f"{XHTML}table")
    ]
    return [{row[0]: row[1:] for row in table} for table in rows]


def change_lines(run: Path, change: Callable[[dict], dict]) -> None:
    """Rewrite every record of metrics.jsonl by ``change``."""
    path = run / "metrics.jsonl"
    path.write_text(lines([change(json.loads(line)) for line in path.read_text().splitlines()]))
