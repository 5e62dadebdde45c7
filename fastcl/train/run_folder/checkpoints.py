"""Checkpoints, from which a run resumes: files whose names contain the digest of their bytes."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastcl.errors import FastclError, brief, shown
from fastcl.io.files import cause
from fastcl.io.json_text import parse_json
from fastcl.io.run_names import RECORDS
from fastcl.train.models import Twin
from fastcl.train.run_folder.records import JsonLines, write_atomic

log = logging.getLogger("fastcl")
_KEPT = 2  # the latest and a fallback
_FREE = ("lr", "params")  # keys of an optimiser's groups that change from step to step
_OF_THE_DEVICE = ("fused", "foreach")  # and those that depend on where it runs; a run may go on elsewhere


@dataclass(frozen=True)
class Checkpoint:
    """A run after some epochs.

    Attributes:
        path: the file.
        epoch: completed epochs.
        run: the settings that identify the run (see `identity`); None in files of earlier versions.
        lengths: length of each of RECORDS in bytes.
        digests: SHA-256 of those bytes; None in files of earlier versions.
        twins: {name: {"network", "optimizer"}}, state dicts.
    """

    path: Path
    epoch: int
    run: dict[str, Any] | None
    lengths: dict[str, int]
    digests: dict[str, str] | None
    twins: dict[str, Any]

    def restore(self, twins: Sequence[Twin]) -> None:
        """Load the state into a run's models. Raises FastclError if it does not belong to them."""
        names = [twin.name for twin in twins]
        if sorted(self.twins) != sorted(names):
            raise self.foreign(f"its models are {brief(sorted(self.twins))}, the run's are {names}")
        for twin in twins:
            state = self.twins[twin.name]
            if wrong := _unfit(state, twin, self.epoch):
                raise self.foreign(f"model {twin.name!r}: {wrong}")
            try:
                groups = [dict(group) for group in twin.optimizer.param_groups]
                twin.network.load_state_dict(state["network"])
                twin.optimizer.load_state_dict(_as_here(state["optimizer"], groups))
            except Exception as error:  # torch may raise anything
                raise self.foreign(f"model {twin.name!r}: {brief(str(error))}") from error
            for group, before in zip(twin.optimizer.param_groups, groups, strict=True):
                changed = [k for k in before if k not in _FREE and group.get(k, before[k]) != before[k]]
                changed += [name for p in group["params"] for name in _misshapen(twin.optimizer.state.get(p, {}), p)]
                if changed:
                    raise self.foreign(f"model {twin.name!r}: its optimiser differs in {', '.join(changed[:3])}")

    def foreign(self, why: str) -> FastclError:
        """The error for an intact file that does not belong to this run."""
        return FastclError(
            f"checkpoint {shown(self.path)} does not belong to this run ({why}); remove it to resume from an earlier "
            "one, or choose another --out"
        )


def save_checkpoint(
    folder: Path, epoch: int, run: dict[str, Any], records: dict[str, JsonLines], twins: Sequence[Twin]
) -> None:
    """Write `epoch_NNNNNN-DIGEST.pt`, named after the (shortened) SHA-256 of its bytes; keep only the last two."""
    lengths = {name: lines.length() for name, lines in records.items()}
    buffer = io.BytesIO()
    torch.save({
        "epoch": epoch,
        "run": json.dumps(run),
        "lengths": lengths,
        "digests": {name: lines.digest(lengths[name]) for name, lines in records.items()},
        "twins": {t.name: {"network": t.network.state_dict(), "optimizer": t.optimizer.state_dict()} for t in twins},
    }, buffer)  # fmt: skip
    payload = buffer.getvalue()
    write_atomic(folder / f"epoch_{epoch:06d}-{_digest(payload)}.pt", payload)
    for path in _found(folder)[_KEPT:]:
        path.unlink(missing_ok=True)


def drop_checkpoints(folder: Path) -> None:
    """Remove all checkpoints."""
    for path in _found(folder):
        path.unlink(missing_ok=True)


def last_epoch(folder: Path) -> int:
    """Completed epochs according to the checkpoints' names; 0 if there is none."""
    return max((_epoch(path) for path in _found(folder)), default=0)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest intact checkpoint, or None if there is no checkpoint.

    Raises:
        FastclError: every checkpoint is damaged, or the latest intact one has unexpected content.
    """
    paths = _found(folder)
    for path in paths:
        try:
            payload = path.read_bytes()
        except OSError as error:
            raise FastclError(f"checkpoint {shown(path)} cannot be read ({cause(error)})") from error
        if _digest(payload) == path.stem.partition("-")[2]:
            return _parsed(path, payload)
        log.warning(
            "checkpoint %s is damaged (%d bytes, wrong digest); trying the previous one", shown(path), len(payload)
        )
    if paths:
        raise FastclError(f"every checkpoint in {shown(folder)} is damaged: {', '.join(shown(p.name) for p in paths)}")
    return None


def _parsed(path: Path, payload: bytes) -> Checkpoint:
    nothing = Checkpoint(path, 0, None, {}, None, {})
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise anything for a foreign file
        raise nothing.foreign(f"torch cannot read it: {brief(str(error))}") from error
    if not isinstance(state, dict):
        raise nothing.foreign(f"it contains a {type(state).__name__}")
    epoch, lengths, digests = (state.get(name) for name in ("epoch", "lengths", "digests"))
    if type(epoch) is not int or epoch != _epoch(path):
        raise nothing.foreign(f"its name says epoch {_epoch(path)}, its content says {brief(epoch)}")
    if not isinstance(lengths, dict) or not all(_whole(lengths.get(name)) for name in RECORDS):
        raise nothing.foreign(f"its lengths are {brief(lengths)}")
    if digests is not None and not (isinstance(digests, dict) and all(name in digests for name in RECORDS)):
        raise nothing.foreign(f"its digests are {brief(digests)}")
    run = state.get("run")
    run = parse_json(str(run).encode(), f"settings in checkpoint {shown(path)}") if run is not None else None
    if not isinstance(run, dict | None):
        raise nothing.foreign(f"its settings are {brief(run)}")
    twins = state.get("twins")
    if not isinstance(twins, dict) or not all(isinstance(name, str) for name in twins):
        raise nothing.foreign(f"its models are {brief(twins)}")
    return Checkpoint(path, epoch, run, lengths, digests, twins)


def _found(folder: Path) -> list[Path]:
    """The checkpoint files, latest first."""
    return sorted(folder.glob("epoch_*.pt"), key=lambda path: (_epoch(path), path.name), reverse=True)


def _epoch(path: Path) -> int:
    digits = path.stem.removeprefix("epoch_").partition("-")[0]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _unfit(state: Any, twin: Twin, epoch: int) -> str:
    """Why a state that torch would load silently cannot come from this twin (at its initial weights); else empty."""
    network, optimizer = ((state.get(key) if isinstance(state, dict) else None) for key in ("network", "optimizer"))
    if not isinstance(network, dict) or not isinstance(optimizer, dict):
        return "it contains no weights or no optimiser"
    initial = twin.network.state_dict()
    for name, value in network.items():
        if isinstance(value, torch.Tensor) and name in initial:
            if value.dtype != initial[name].dtype:
                return f"{name} is {value.dtype}, the run's is {initial[name].dtype}"
            if not value.isfinite().all():
                return f"{name} is not finite"
    kept, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(kept, dict) or not all(isinstance(held, dict) for held in kept.values()):
        return f"its optimiser's state is {brief(kept)}"
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return f"its optimiser's groups are {brief(groups)}"
    numbers = [number for group in groups for number in group.get("params", ())]
    names = {parameter: name for name, parameter in twin.network.named_parameters()}
    ours = [(names[p], _kept_by(group)) for group in twin.optimizer.param_groups for p in group["params"]]
    for number, (name, wanted) in zip(numbers, ours, strict=False):  # torch checks the lengths
        held = {key: value for key, value in kept.get(number, {}).items() if isinstance(value, torch.Tensor)}
        moved = epoch > 0 and isinstance(network.get(name), torch.Tensor) and not _equal(network[name], initial[name])
        if (moved or held) and (gone := sorted(wanted - held.keys())):
            return f"after {epoch} epochs its optimiser has no {gone[0]} for {name}"
        for key, value in held.items():
            if value.dtype != torch.float32 or not value.isfinite().all():
                how = "not finite" if value.dtype == torch.float32 else f"{value.dtype}, not torch.float32"
                return f"its optimiser's {key} for {name} is {how}"
    return ""


def _as_here(optimizer: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A saved optimiser whose groups run as this device's do: where PyTorch loads its tensors to depends on it."""
    ours = [{key: group[key] for key in _OF_THE_DEVICE if key in group} for group in groups]
    there = optimizer["param_groups"]
    return optimizer | {"param_groups": [saved | own for saved, own in zip(there, ours, strict=False)]}


def _kept_by(group: dict[str, Any]) -> set[str]:
    """Names of the state that one of our optimisers keeps for a parameter after a step."""
    if "betas" in group:
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if group["momentum"] else set()


def _equal(value: torch.Tensor, initial: torch.Tensor) -> bool:
    return torch.equal(value.cpu(), initial.cpu())


def _misshapen(state: dict[str, Any], parameter: torch.Tensor) -> list[str]:
    """Names of a parameter's optimiser tensors that do not have its shape."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return [name for name, value in tensors.items() if value.shape not in ((), parameter.shape)]
