"""The command `fastcl eval`: probes of frozen features, of every model of a run or of two files."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from fastcl.cli.feature_files import read_labelled
from fastcl.errors import FastclError, shown
from fastcl.evaluation.comparison import Split, accuracy_rows, remarks
from fastcl.evaluation.frozen import FrozenFeatures, frozen_features
from fastcl.evaluation.record import ModelRecord, read_record, write_record
from fastcl.evaluation.suite import ProbeSettings, begun, check_probes, check_settings, settings_of, with_probe
from fastcl.io.arrays import ENDINGS
from fastcl.io.outputs import check_output
from fastcl.io.run_names import EVALUATION, FILES, FOLDERS, REPORT

_FILES = "features"  # what files are called where a run has names of models


@dataclass(frozen=True, eq=False)
class _Task:
    """Attributes:
    digests: by model, of its features.
    epoch: of the models; None if not known.
    probes, settings: what to run.
    path: file of the results; None: none is written.
    """

    digests: Mapping[str, str]
    epoch: int | None
    probes: Sequence[str]
    settings: ProbeSettings
    path: Path | None

    def kept(self) -> dict[str, ModelRecord]:
        """Results of the same features that are in the file already."""
        before = (self.path and read_record(self.path)) or {}
        return {name: one for name, one in before.items() if one.features == self.digests.get(name)}

    def lacking(self, records: Mapping[str, ModelRecord]) -> dict[str, list[str]]:
        """By model, the probes that have not run with these settings; models that lack none are left out."""
        wanted = {probe: settings_of(probe, self.settings) for probe in self.probes}
        has = {name: records[name].settings if name in records else {} for name in self.digests}
        lacks = {name: [p for p in wanted if done.get(p) != wanted[p]] for name, done in has.items()}
        return {name: probes for name, probes in lacks.items() if probes}


def evaluate_frozen(args: argparse.Namespace) -> None:
    """Evaluate what the arguments name, write the results after each probe, and print them.

    Raises:
        FastclError: neither or both of a run and files; files or a run that cannot be read; settings that the probes
            refuse; an output that cannot be written or would replace an input.
    """
    if (args.run is None) == (args.features is None):
        raise FastclError("give the folder of a run, or --features TRAIN TEST")
    probes = [name.strip().replace("-", "_") for name in args.probes.split(",")]
    check_probes(probes)
    settings = ProbeSettings(k=args.k, shots=args.shots, repeats=args.repeats, seed=args.seed)
    if args.run is not None:
        if args.run.exists() and not args.run.is_dir():
            raise FastclError(f"{shown(args.run)} is not a folder; give that of a run, or --features TRAIN TEST")
        _probe_run(args.run, args.json or args.run / EVALUATION, args.overrides, probes, settings)
    elif args.overrides:
        raise FastclError("--set is for the data of a run, not for --features")
    else:
        train, test = args.features
        _probe_files(train, test, args.json, probes, settings)


def _probe_run(run: Path, path: Path, overrides: Sequence[str], probes: Sequence[str], settings: ProbeSettings) -> None:
    from fastcl.train.frozen_run import open_frozen

    _check_json(path, [run / name for name in (*FILES, *FOLDERS, REPORT) if name != EVALUATION])
    frozen = open_frozen(run, overrides)
    train, test = frozen.inputs.data.train, frozen.inputs.data.test
    labels, test_labels, ids = map(torch.from_numpy, (train.labels, test.labels, train.ids))
    check_settings(settings, labels)  # encoding may take long
    task = _Task(frozen.digests, frozen.epoch, probes, settings, path)
    records = task.kept()
    lacking = task.lacking(records)
    print(
        f"{shown(run)}, epoch {frozen.epoch}: {len(frozen.twins)} models, {len(train)} training and {len(test)} "
        f"held-out images of {frozen.inputs.data.name}"
    )
    features = frozen.features(list(lacking)) if lacking else {}

    def data(name: str) -> FrozenFeatures:
        on_train, on_test = features.pop(name)
        return frozen_features(on_train, labels, on_test, test_labels, ids)

    _measure(task, records, lacking, data)
    print(f"results: {shown(path)}" + (f" (fastcl report {shown(run)} draws them)" if path.name == EVALUATION else ""))


def _probe_files(train: Path, test: Path, path: Path | None, probes: Sequence[str], settings: ProbeSettings) -> None:
    if path is not None:
        _check_json(path, [train, test])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (x, labels, ids), (x_test, labels_test, _) = (read_labelled(file) for file in (train, test))
    tensors = [x, labels, x_test, labels_test, *([ids] if ids is not None else [])]
    task = _Task({_FILES: _digest(tensors)}, None, probes, settings, path)
    records = task.kept()
    print(f"{shown(train)} {tuple(x.shape)} for fitting, {shown(test)} {tuple(x_test.shape)} for testing")
    _measure(
        task, records, task.lacking(records),
        lambda _: frozen_features(x.to(device), labels, x_test, labels_test, ids),
    )  # fmt: skip
    if path is not None:
        print(f"results: {shown(path)}")


def _measure(
    task: _Task, records: dict[str, ModelRecord], lacking: Mapping[str, Sequence[str]],
    data_of: Callable[[str], FrozenFeatures],
) -> None:  # fmt: skip
    """Run the probes that are lacking, into the records and their file, and print the table."""
    with tqdm(total=sum(map(len, lacking.values())), unit="probe", disable=None) as bar, logging_redirect_tqdm():
        for name, probes in lacking.items():
            try:
                data = data_of(name)
                one = records.setdefault(name, ModelRecord(task.digests[name], begun(data), epoch=task.epoch))
                for probe in probes:
                    bar.set_description(f"{name}: {probe}")
                    one.evaluation = with_probe(one.evaluation, probe, data, task.settings)
                    one.settings[probe] = settings_of(probe, task.settings)
                    if task.path is not None:
                        write_record(task.path, {name: records[name] for name in task.digests if name in records})
                    bar.update()
            except FastclError as error:
                raise FastclError(f"{name}: {error}" if len(task.digests) > 1 else error) from error
    found = {name: records[name].evaluation for name in task.digests}
    splits: dict[Split, str] = {"train": "training split", "test": "test split"}
    for split, title in splits.items():
        print("\n".join(_table([[f"accuracy on the {title}", *found], *accuracy_rows(found, split, task.probes)])))
    for line in remarks(found):
        print(line)


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'>' if k else '<'}{width}}" for k, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _check_json(path: Path, inputs: Sequence[Path]) -> None:
    check_output(path, "--json", inputs)
    if path.suffix.lower() in ENDINGS:
        raise FastclError(f"--json: {shown(path)} looks like a feature file; use the ending .json")


def _digest(tensors: Sequence[Tensor]) -> str:
    """Of shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(f"{tuple(x.shape)} {x.dtype}".encode())
        found.update(x.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
