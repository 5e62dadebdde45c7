"""The lockstep trainer: each batch is rendered once, every twin takes a step on it, and their alignment is measured."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
import torchvision
from tqdm import tqdm

import fastcl
from fastcl.config.settings import Config
from fastcl.data import Batch
from fastcl.errors import FastclError, one_of, shown
from fastcl.io.run_names import RECORDS
from fastcl.train.inputs import data_paths, image_folders, open_inputs
from fastcl.train.measures.evaluate import encode, evaluate
from fastcl.train.measures.layer_table import check_layers, write_layers
from fastcl.train.models import STEP_VALUES, learning_rate, make_twins
from fastcl.train.network import plain_defaults
from fastcl.train.run_folder.board import Board
from fastcl.train.run_folder.checkpoints import save_checkpoint
from fastcl.train.run_folder.identity import claim_folder, escaped, identity, missing_files, settings, warn_if_elsewhere
from fastcl.train.run_folder.records import JsonLines, check_run_folder, locked, write_atomic
from fastcl.train.run_folder.resume import NOT_BEGUN, resume
from fastcl.train.step import StepTable, partner_of, step_twins

log = logging.getLogger("fastcl")


class Lockstep:
    """One run: its data, its twins, its folder. Switches PyTorch to deterministic algorithms for the whole process.

    Args:
        config: the run's config.
        out: its folder, created if absent. If it already holds the same run, training resumes from the last checkpoint,
            and the result is bit-identical to that of an uninterrupted run.
        inputs: other files that the run reads besides its data, such as its config; they are never overwritten.

    Raises:
        FastclError: invalid config values, data that cannot be read, a folder that holds another run or cannot be
            written.
    """

    @plain_defaults()
    def __init__(self, config: Config, out: Path, inputs: Iterable[Path] = ()) -> None:
        self.config, self.out = config, Path(out)
        check_run_folder(self.out, [*inputs, *data_paths(config)], image_folders(config))
        self.device = _device(config.train.device)
        # cuBLAS reads this on first use; without it deterministic mode raises on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read here, and filling is slow
        self.inputs = open_inputs(config, self.out, self.device)
        self.data, self.loader = self.inputs.data, self.inputs.loader
        self.twins = make_twins(config, self.data.channels, len(self.data.classes), self.device)
        check_layers(self.twins[0], config.train.layers)
        self.records = {name: JsonLines(self.out / f"{name}.jsonl") for name in RECORDS}
        self.epoch = 0  # completed epochs
        with locked(self.out):
            claim_folder(self.out, self._describe())

    @plain_defaults()
    def run(self) -> None:
        """Train to the end, from the last checkpoint in the folder if there is one. On a finished run, write
        only outputs that are missing or damaged.

        Writes run.json, metrics.jsonl, steps.jsonl, pairs.jsonl (if there are two models), timing.jsonl, tensorboard/,
        checkpoints/, and at the end weights/, features/ (encoder outputs of the held-out images, in the order of the
        split) and layers.json (CKA of the layers; if there are two models).

        Raises:
            FastclError: a loss that is not finite (names the model and the step), an image that cannot be read, or a
                folder that cannot be written. Completed work stays intact.
        """
        with locked(self.out):
            claim_folder(self.out, self._describe())  # another process may have used the folder meanwhile
            self._run()

    def _run(self) -> None:
        epochs, total = self.config.train.epochs, len(self.loader)
        every = self.config.train.checkpoint_every
        done = resume(self.out, identity(self._describe()), epochs, every, self.records, self.twins)
        if done is None:
            log.info("already finished: %d epochs in %s (its last checkpoint is missing)", epochs, shown(self.out))
            return
        if done == epochs:
            self.epoch = epochs
            self._complete()
            return
        warn_if_elsewhere(self.out, self._describe())
        if done == NOT_BEGUN:
            self._measure({})
            self._checkpoint()
        self.epoch = max(done, 0)
        board = Board(self.out / "tensorboard", self.epoch * total)
        images = self.loader.batch_size * total
        columns = shutil.get_terminal_size().columns  # tqdm itself assumes 0 if the terminal gives no size
        done = images * self.epoch
        bar = tqdm(total=images * epochs, initial=done, unit="img", unit_scale=True, ncols=columns, disable=None)
        with board, bar:
            for epoch in range(self.epoch, epochs):
                with closing(self.loader.batches(epoch)) as batches:
                    means = self._train_epoch(epoch, batches, board, bar)
                self.epoch = epoch + 1
                last = self.epoch == epochs
                if last or self.epoch % self.config.train.eval_every == 0:
                    self._measure(means, board)
                board.flush()
                if last or self.epoch % self.config.train.checkpoint_every == 0:
                    self._checkpoint()
        self._finish()

    def _train_epoch(self, epoch: int, batches: Iterator[Batch], board: Board, bar: tqdm) -> dict[str, list[float]]:
        """One epoch; returns each twin's means of STEP_VALUES."""
        total, started, waiting = len(self.loader), time.perf_counter(), 0.0
        partner = partner_of(self.twins)
        sums = np.zeros((len(self.twins), len(STEP_VALUES)))
        records: list[dict[str, Any]] = []
        pairs: list[dict[str, Any]] = []
        for k in range(total):
            step = epoch * total + k
            mark = time.perf_counter()
            batch = next(batches)
            waiting += time.perf_counter() - mark
            lr = learning_rate(self.config, step, total)
            table = self._step(step, lr, batch)
            sums += table.values
            for twin, row in zip(self.twins, table.values.tolist(), strict=True):
                named = dict(zip(STEP_VALUES, row, strict=True))
                records.append({"step": step, "epoch": epoch, "model": twin.name, **named, "lr": lr})
                board.scalar(f"loss/{twin.name}", named["loss"], step)
            if partner is not None:
                names, apart = [self.twins[0].name, partner.name], table.pair()
                pairs.append({"step": step, "epoch": epoch, "pair": names, **apart, "lr": lr})
                for name in (name for name, value in apart.items() if value is not None):
                    board.scalar(f"batch_{name}/{'-'.join(names)}", apart[name], step)
            bar.set_postfix_str(f"epoch {epoch + 1}, {self.twins[0].name} loss {table.values[0, 0]:.4f}", refresh=False)
            bar.update(self.loader.batch_size)
        self.records["steps"].append(records)
        if partner is not None:
            self.records["pairs"].append(pairs)
        seconds = time.perf_counter() - started
        rate = total * self.loader.batch_size / seconds
        self.records["timing"].append(
            [{"epoch": epoch + 1, "seconds": seconds, "images_per_second": rate, "rendering_seconds": waiting}]
        )
        return {t.name: row.tolist() for t, row in zip(self.twins, sums / total, strict=True)}

    def _step(self, step: int, lr: float, batch: Batch) -> StepTable:
        """Step every twin on its views and check that all values are finite."""
        t = self.config.train
        table = step_twins(
            self.twins, batch.views[:2], batch.views[2:] or None, batch.labels,
            temperature=t.temperature, lr=lr, seed=t.seed << 32 | step, micro_batch=t.micro_batch,
        )  # fmt: skip
        for twin, row in zip(self.twins, table.values, strict=True):
            for name, value in zip(STEP_VALUES, row, strict=True):
                if not math.isfinite(value):
                    raise FastclError(
                        f"{name} of model {twin.name!r} is {value} at step {step} (epoch {step // len(self.loader)}, "
                        f"lr {lr:.4g}); epochs up to {self.epoch} are complete in {shown(self.out)}"
                    )
        return table

    def _measure(self, means: dict[str, list[float]], board: Board | None = None) -> None:
        records = evaluate(self.epoch, self.twins, self.inputs.train, self.inputs.test, means)
        self.records["metrics"].append(records)
        for r in records:
            name = "-".join(r["pair"]) if "pair" in r else r["model"]
            for key, value in r.items():
                if board is not None and key not in ("epoch", "pair", "model") and value is not None:
                    board.scalar(f"{key}/{name}", value, self.epoch * len(self.loader))
        reference = self.twins[0].name
        pairs = [r for r in records if r.get("pair", [""])[0] == reference]
        shown = ", ".join(f"{r['pair'][1]} {_show(r['cka_debiased'])}" for r in pairs)
        log.info("epoch %d: debiased CKA with %s: %s", self.epoch, reference, shown or "no other model")

    def _checkpoint(self) -> None:
        run = identity(self._describe())
        save_checkpoint(self.out / "checkpoints", self.epoch, run, self.records, self.twins)

    def _finish(self) -> None:
        self._write_tensors(
            [f"{folder}/{t.name}.safetensors" for folder in ("weights", "features") for t in self.twins]
        )
        write_layers(self.out / "layers.json", self.twins, self.inputs.test, self.config.train.layers)
        log.info("finished: %d epochs in %s", self.epoch, shown(self.out))

    def _complete(self) -> None:
        """Write final outputs that a finished run lacks, and those of models whose weights are not the last ones."""
        wanted = list(missing_files(self.out, [twin.name for twin in self.twins]))
        strange = False
        for twin in self.twins:
            weights, features = (f"{folder}/{twin.name}.safetensors" for folder in ("weights", "features"))
            if weights not in wanted and (self.out / weights).read_bytes() != _saved(twin.network.state_dict()):
                strange, wanted = True, [*wanted, weights, features]
        wanted = list(dict.fromkeys(wanted))
        self._write_tensors(wanted)
        layers = self.out / "layers.json"
        if strange or not _is_json(layers):  # it is also missing if the CKA of all layers is undefined
            write_layers(layers, self.twins, self.inputs.test, self.config.train.layers)
            wanted += [layers.name] if layers.is_file() else []
        wrote = f"; wrote what was missing or damaged: {', '.join(wanted)}" if wanted else ""
        log.info("already finished: %d epochs in %s%s", self.epoch, shown(self.out), wrote)

    def _write_tensors(self, names: Sequence[str]) -> None:
        """Write the named ones of "weights/MODEL.safetensors" and "features/MODEL.safetensors"."""
        features = encode(self.twins, self.inputs.test) if any(name.startswith("features/") for name in names) else {}
        for twin in self.twins:
            tensors = {"weights": twin.network.state_dict(), "features": {"features": features.get(twin.name)}}
            for folder, content in tensors.items():
                if (name := f"{folder}/{twin.name}.safetensors") in names:
                    write_atomic(self.out / name, _saved(content))

    def _describe(self) -> dict[str, Any]:
        data = self.data
        return escaped({
            "config": settings(self.config),
            "seed": self.config.train.seed,
            "versions": {
                "fastcl": fastcl.__version__, "python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": np.__version__,
            },
            "device": _device_name(self.device),
            "renderer": self.inputs.renderer,
            "skipped": data.skipped,  # images that cannot be decoded (data.corrupt): sample id -> which one and why
            "left_out": data.left_out,  # what else was found but not used, in words
            "models": [t.name for t in self.twins],
            "reference": self.twins[0].name,
            "parameters": {t.name: sum(p.numel() for p in t.network.parameters()) for t in self.twins},
            "data": {
                "source": data.name, "train": len(data.train), "test": len(data.test), "classes": len(data.classes),
                "channels": data.channels, "size": self.config.views.size,
                "largest_class": int(np.bincount(data.train.labels).max()) / len(data.train),
            },
        })  # fmt: skip


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _saved(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save({name: value.contiguous().cpu() for name, value in tensors.items()})


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise FastclError(one_of("train.device", ("auto", "cpu", "cuda"), name))
    if name == "cuda" and not torch.cuda.is_available():
        raise FastclError("train.device is 'cuda', but torch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
