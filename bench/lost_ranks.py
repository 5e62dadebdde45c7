"""How long a run under torchrun takes to end when one of its ranks is killed or stopped, and whether it is named.

A small ResNet-18 on scikit-learn's digits, ranks on this machine, gloo. The first or the last rank is lost while it
trains, while it evaluates, or while the first rank writes a checkpoint: each process notes what its main thread does.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness.command import ROOT, Command
from bench.harness.records import Record, digits, grouped, machine, table, write
from fastcl.config.written import toml
from fastcl.errors import FastclError
from fastcl.train.run_folder.checkpoints import load_checkpoint

TIMEOUT = 5  # train.timeout in seconds
OPTIONS = {"channels": [32, 64, 128, 256]}  # of the ResNet: a checkpoint of 45 MB
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
# What a rank is doing, by the name of the function.
MOMENTS = {"a step": "step_twins", "an evaluation": "evaluate", "a checkpoint": "save_checkpoint"}
_PATIENCE = 240  # seconds: for the moment, and for the end
# Loaded by each process as Python starts. A reader sees one note or the next, never half of one.
_NOTES = """\
import os, sys, threading, time

def note():
    file, main = os.open(os.environ["NOTES"] + os.environ["RANK"], os.O_WRONLY | os.O_CREAT), threading.main_thread()
    while main.is_alive():
        frame, name = sys._current_frames().get(main.ident), ""
        while frame is not None and name not in os.environ["NOTED"].split():
            frame, name = frame.f_back, frame.f_code.co_name
        os.pwrite(file, name.ljust(40).encode(), 0)
        time.sleep(0.002)

if "RANK" in os.environ:
    threading.Thread(target=note, daemon=True).start()
"""


class Loss(NamedTuple):
    """A rank that is lost: how, which one of how many, and what it is doing or, for a checkpoint, the first rank."""

    how: str
    ranks: int
    rank: int
    during: str


def losses() -> Iterator[Loss]:
    """All that are measured."""
    for how, during, ranks in itertools.product(SIGNALS, MOMENTS, (2, 3)):
        for rank in (0, ranks - 1):
            yield Loss(how, ranks, rank, during)


def measure(loss: Loss, options: Mapping[str, object], folder: Path) -> Record:
    """One run until a rank is lost, after an epoch or more, and to its end.

    Args:
        options: of the ResNet.
        folder: for the run and what it says; exists.

    Returns:
        seconds: from the signal to the end of torchrun. status: its exit status. named: whether a message of the run or
        of torchrun names the rank. said: the error of the run; empty if torchrun alone speaks. epoch: of the last
        checkpoint, which is whole.

    Raises:
        FastclError: the run ended before the moment, or did not end after it; a damaged checkpoint.
    """
    with open(folder / "said", "wb") as said:
        process = subprocess.Popen(
            _command(loss, options, folder), env=_environment(folder), stdout=said, stderr=subprocess.STDOUT
        )
        try:
            victim = _at_its_moment(loss, folder, process)
            began = time.perf_counter()
            os.kill(victim, SIGNALS[loss.how])
            process.wait(_PATIENCE)
            seconds = time.perf_counter() - began
        except subprocess.TimeoutExpired as error:
            raise FastclError(f"the run went on for {_PATIENCE} s") from error
        finally:
            process.terminate()  # torchrun ends its processes
            process.wait()
    found = load_checkpoint(folder / "run" / "checkpoints")
    assert found is not None
    text = (folder / "said").read_text(encoding="utf-8", errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    ours = f"rank {loss.rank} of {loss.ranks} no longer answers"
    theirs = f"rank      : {loss.rank} (local_rank: {loss.rank})\n  exitcode  : -9"
    return {
        "seconds": seconds, "status": process.returncode, "named": any(ours in e for e in errors) or theirs in text,
        "said": "\n".join(errors), "epoch": found.epoch,
    }  # fmt: skip


def _command(loss: Loss, options: Mapping[str, object], folder: Path) -> list[str]:
    tables = {
        "data": {"source": "digits", "classes": 2},
        "views": {"preset": "characters", "size": 16},
        "model": {"name": "resnet18", "options": dict(options), "hidden": 32, "projection": 16},
        "optim": {"name": "sgd", "lr": 0.01},
        "train": {"models": ["dcl", "ce"], "controls": [], "batch_size": 64, "epochs": 10_000, "timeout": TIMEOUT},
    }
    config = folder / "run.toml"
    config.write_text("\n".join(f"{key} = {toml(found)}" for key, found in tables.items()), encoding="utf-8")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(loss.ranks))
    return [*torchrun, "-m", "fastcl", "train", str(config), "--out", str(folder / "run")]


def _environment(folder: Path) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(_NOTES, encoding="utf-8")
    return os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "NOTES": f"{folder / 'rank'}-",
        "NOTED": " ".join(MOMENTS.values()), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def _at_its_moment(loss: Loss, folder: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait for the moment; the rank's process."""
    checkpoints, until = folder / "run" / "checkpoints", time.monotonic() + _PATIENCE
    note = folder / f"rank-{0 if loss.during == 'a checkpoint' else loss.rank}"
    victim = None
    while time.monotonic() < until:
        if process.poll() is not None:
            text = (folder / "said").read_text(encoding="utf-8", errors="replace")
            raise FastclError(f"the run ended early: {text[-500:]}")
        if victim is None:
            victim = _rank(process.pid, loss.rank) if list(checkpoints.glob("epoch_000001-*.pt")) else None
        elif note.read_text(encoding="utf-8").strip() == MOMENTS[loss.during]:
            return victim
        time.sleep(0.001)
    raise FastclError(f"the moment did not come within {_PATIENCE} s")


def _rank(torchrun: int, rank: int) -> int:
    """The process of a rank among torchrun's children."""
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text(encoding="utf-8").split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise FastclError(f"rank {rank} is none of torchrun's processes")


def lost_table(records: Sequence[Record]) -> str:
    """Seconds until the end, over the first and the last rank; and of how many runs a message named the rank."""
    rows = []
    for (how, during), found in grouped(records, "how", "during").items():
        cells = [f"{how} during {during}"]
        for ranks in (2, 3):
            seconds = sorted(r["seconds"] for r in found if r["ranks"] == ranks)
            cells.append("-".join(dict.fromkeys(digits(s) for s in (seconds[0], seconds[-1]))) if seconds else "")
        rows.append([*cells, f"{sum(r['named'] for r in found)} of {len(found)}"])
    return table(("a rank is", "s, of 2 ranks", "s, of 3 ranks", "named"), rows, left=1)


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results after each run; return the exit status."""
    parser = Command("lost_ranks", [__doc__ or ""])
    parser.add_names("--how", tuple(SIGNALS))
    args = parser.parse(argv)
    facts, records, failed = machine(torch.device("cpu")), [], 0
    for loss in (one for one in losses() if one.how in args.how):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = measure(loss, OPTIONS, Path(folder))
            except FastclError as error:
                print(f"error: {loss}: {error}", file=sys.stderr)
                failed += 1
                continue
        records.append({"bench": "lost_ranks", **loss._asdict(), "timeout": TIMEOUT} | found | facts)
        print(f"{loss}: {digits(found['seconds'])} s, {'named' if found['named'] else 'not named'}", flush=True)
        head = f"# Ranks that are lost\n\n{facts['device']}, {facts['date']}; train.timeout = {TIMEOUT} s\n\n"
        write(args.out, "lost_ranks", records, head + lost_table(records))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
