"""The lockstep trainer: each batch is rendered once, every twin takes a step on it, and their alignment is measured."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from tqdm import tqdm

import fastcl
from fastcl.config.settings import Config
from fastcl.errors import shown
from fastcl.train.epoch import Steps
from fastcl.train.finals import complete_finals, write_finals
from fastcl.train.group import average_buffers, copy_state, start
from fastcl.train.inputs import data_paths, image_folders, images_digest, open_inputs, run_device
from fastcl.train.measures.evaluate import evaluate
from fastcl.train.measures.layer_table import check_layers
from fastcl.train.models import make_twins
from fastcl.train.network import plain_defaults
from fastcl.train.run_folder.checkpoints import save_checkpoint
from fastcl.train.run_folder.identity import claim_folder, differences, escaped, identity, settings, warn_if_elsewhere
from fastcl.train.run_folder.logbook import Logbook
from fastcl.train.run_folder.records import check_run_folder, locked
from fastcl.train.run_folder.resume import NOT_BEGUN, resume
from fastcl.train.step_profile import StepProfile

log = logging.getLogger("fastcl")


class Lockstep:
    """One run: its data, its twins, its folder. Switches PyTorch to deterministic algorithms for the whole process.
    Under torchrun each rank makes one.

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
        self.ranks = start()
        with self.ranks.watched():
            with self.ranks.together():
                self._open(inputs)
            mine = identity(self._describe()) | {"images": images_digest(self.data)}
            self.ranks.agree(mine, lambda first: differences(first, mine))
            with self.ranks.together(), self._holding():
                pass
            self.ranks = self.ranks.within(config.train.timeout)  # to open data may take a rank longer than others

    def _open(self, inputs: Iterable[Path]) -> None:
        config = self.config
        if self.ranks.first:
            check_run_folder(self.out, [*inputs, *data_paths(config)], image_folders(config))
        self.device = run_device(config.train.device, self.ranks)
        # cuBLAS reads this on first use; without it deterministic mode raises on a GPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # none is read here, and filling is slow
        self.inputs = open_inputs(config, self.out, self.device, self.ranks)
        self.data, self.loader = self.inputs.data, self.inputs.loader
        self.twins = make_twins(config, self.data.channels, len(self.data.classes), self.device)
        check_layers(self.twins[0], config.train.layers)
        self.log = Logbook(self.out, self.ranks.first)
        self.epoch = 0  # completed epochs

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """The first rank holds the folder's lock, and the folder holds this run."""
        with locked(self.out) if self.ranks.first else nullcontext():
            if self.ranks.first:
                claim_folder(self.out, self._describe())  # another process may have used the folder meanwhile
            yield

    @plain_defaults()
    def run(self, *, profile: bool = False) -> None:
        """Train to the end, from the last checkpoint in the folder if there is one. On a finished run, write
        only outputs that are missing or damaged.

        Writes run.json, metrics.jsonl, steps.jsonl, pairs.jsonl (if there are two models), timing.jsonl, tensorboard/,
        checkpoints/, and at the end weights/, features/ (encoder outputs of the held-out images, in the order of the
        split) and layers.json (CKA of the layers; if there are two models). Under torchrun the first rank writes.

        Args:
            profile: also profile a few steps of the first epoch that is trained, into profile/ (`StepProfile`). Nothing
                else of the run changes.

        Raises:
            FastclError: a loss that is not finite (names the model and the step), an image that cannot be read, or a
                folder that cannot be written; under torchrun on all ranks, also a rank that no longer answers.
                Completed work stays intact.
        """
        with self.ranks.watched(), ExitStack() as held:
            with self.ranks.together():
                held.enter_context(self._holding())
            self._run(profile)

    def _run(self, profile: bool) -> None:
        epochs = self.config.train.epochs
        done = self._resume()
        if done is None or done == epochs:
            self.epoch = epochs
            if self.ranks.first:
                self._tell_finished(done is not None)
            return
        if done == NOT_BEGUN:
            self._measure({})
            self._checkpoint()
        self.epoch = max(done, 0)
        with ExitStack() as held:
            with self.ranks.together():
                held.enter_context(self.log.board(self.epoch * len(self.loader)))
            self._train(held.enter_context(self._bar()), self._steps(profile))
        write_finals(self.out, self.twins, self.inputs.test, self.config.train.layers, self.ranks)
        if self.ranks.first:
            log.info("finished: %s", self._where())

    def _bar(self) -> tqdm:
        images = self.loader.batch_size * len(self.loader)
        return tqdm(
            total=images * self.config.train.epochs, initial=images * self.epoch, unit="img", unit_scale=True,
            ncols=shutil.get_terminal_size().columns,  # tqdm itself assumes 0 if the terminal gives no size
            disable=None if self.ranks.first else True,
        )  # fmt: skip

    def _steps(self, profiled: bool) -> Steps:
        profile = None
        if profiled and self.ranks.first:
            title = f"{len(self.twins)} models, batch of {self.loader.batch_size}, {_device_name(self.device)}"
            profile = StepProfile(self.out, self.device, len(self.loader), title)
        total, where = len(self.loader), shown(self.out)
        return Steps(self.config, self.twins, self.ranks, self.log, total, self.device, where, profile)

    def _train(self, bar: tqdm, steps: Steps) -> None:
        t = self.config.train
        for epoch in range(self.epoch, t.epochs):
            with closing(self.loader.batches(epoch)) as batches:
                means = steps.epoch(epoch, batches, bar)
            self.epoch = epoch + 1
            last = self.epoch == t.epochs
            if last or self.epoch % t.eval_every == 0:
                self._measure(means)
            with self.ranks.together():
                self.log.flush()
            if last or self.epoch % t.checkpoint_every == 0:
                self._checkpoint()

    def _resume(self) -> int | None:
        """Restore the last checkpoint on all ranks; returns what `resume` returns."""
        t, done = self.config.train, None
        with self.ranks.together():
            if self.ranks.first:
                run = self._describe()
                done = resume(self.out, identity(run), t.epochs, t.checkpoint_every, self.log.files, self.twins)
                if done is not None and done < t.epochs:
                    warn_if_elsewhere(self.out, run)
        done = self.ranks.from_first(done)
        if done is not None and done < t.epochs:
            copy_state(self.twins, self.ranks)
        return done

    def _tell_finished(self, has_checkpoint: bool) -> None:
        if not has_checkpoint:
            log.info("already finished: %s (its last checkpoint is missing)", self._where())
            return
        wrote = complete_finals(self.out, self.twins, self.inputs.test, self.config.train.layers)
        more = f"; wrote what was missing or damaged: {', '.join(wrote)}" if wrote else ""
        log.info("already finished: %s%s", self._where(), more)

    def _where(self) -> str:
        return f"{self.epoch} epoch{'s' * (self.epoch != 1)} in {shown(self.out)}"

    def _measure(self, means: dict[str, list[float]]) -> None:
        for twin in self.twins:
            average_buffers(twin.network, self.ranks)
        records = evaluate(self.epoch, self.twins, self.inputs.train, self.inputs.test, means, self.ranks)
        with self.ranks.together():
            self.log.evaluation(records, self.epoch * len(self.loader))
        reference = self.twins[0].name
        pairs = [r for r in records if r.get("pair", [""])[0] == reference]
        if self.ranks.first:
            told = ", ".join(f"{r['pair'][1]} {_show(r['cka_debiased'])}" for r in pairs)
            log.info("epoch %d: debiased CKA with %s: %s", self.epoch, reference, told or "no other model")

    def _checkpoint(self) -> None:
        for twin in self.twins:
            average_buffers(twin.network, self.ranks)
        with self.ranks.together():
            if self.ranks.first:
                run = identity(self._describe())
                save_checkpoint(self.out / "checkpoints", self.epoch, run, self.log.files, self.twins)

    def _describe(self) -> dict[str, Any]:
        data = self.data
        return escaped({
            "config": settings(self.config),
            "seed": self.config.train.seed,
            "versions": {
                "fastcl": fastcl.__version__, "python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "timm": timm.__version__, "numpy": np.__version__,
            },
            "device": _device_name(self.device) + (f" x {self.ranks.size} ranks" if self.ranks.size > 1 else ""),
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)"


def _show(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
