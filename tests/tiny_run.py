"""A run that takes seconds: three digits, a network of a few thousand weights."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fastcl.train import Config, parse_config

ROOT = Path(__file__).parents[1]
TABLES = {
    "data": {"source": "digits", "classes": 3},
    "views": {"preset": "characters", "size": 8},
    "model": {
        "name": "resnet18",
        "options": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 16], "stem_type": "deep", "stem_width": 4},
        "hidden": 16,
        "projection": 8,
    },
    "optim": {"name": "sgd", "lr": 0.05, "warmup_epochs": 1},
    "train": {"models": ["dcl", "nscl", "ce"], "batch_size": 64, "epochs": 3, "seed": 7},
}


def tiny_config(**changes) -> Config:
    """The tiny run with values replaced, as `train__epochs=1`."""
    tables = {name: dict(table) for name, table in TABLES.items()}
    for key, value in changes.items():
        table, _, name = key.partition("__")
        tables[table][name] = value
    return parse_config(tables)


def tiny_toml(path: Path) -> Path:
    """The tiny run as a TOML file."""

    def show(value):
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{k} = {show(v)}" for k, v in value.items()) + " }"
        return str(value) if not isinstance(value, str | list) else repr(value).replace("'", '"')

    lines = []
    for name, table in TABLES.items():
        lines += [f"[{name}]", *(f"{k} = {show(v)}" for k, v in table.items()), ""]
    path.write_text("\n".join(lines))
    return path


def start(*arguments: str | Path, output: int | IO = subprocess.PIPE, **options) -> subprocess.Popen:
    """The command line in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastcl", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True, **options)


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """Run the command line to its end; stdout holds both streams."""
    process = start(*arguments, **options)
    output, _ = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, output)


def results(
    out: Path, records: Sequence[str] = ("metrics.jsonl", "steps.jsonl", "pairs.jsonl", "layers.json")
) -> dict[str, bytes]:
    """The bytes that must repeat: records, final weights and features."""
    names = list(records)
    names += sorted(str(p.relative_to(out)) for folder in ("weights", "features") for p in (out / folder).iterdir())
    return {name: (out / name).read_bytes() for name in names}
