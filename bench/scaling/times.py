"""Times of the formulas' operations and bytes, from predicted times of kernels and assumed links."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bench.harness.records import having, read
from bench.scaling.formulas import TRITON, Cost, Pass, Setting

SIZE, COLUMNS = 65_536, 512  # rows of both towers, and columns, of the predicted CLIP loss that gives the rates


class Link(NamedTuple):
    """Gigabytes a second that a GPU sends."""

    name: str
    gathers: float
    ring: float  # to one neighbour


# Assumed, not measured: half of NVLink's 900 GB/s; eight network cards of 400 Gb/s a node, of which NCCL's collectives
# use all and a ring in the order of the ranks one.
NODE = Link("NVLink, one node", 450, 450)
NETWORK = Link("eight network cards a node", 370, 50)
ONE_CARD = Link("one network card a node", 50, 50)


class Rates(NamedTuple):
    """Milliseconds of an operation."""

    forward: float
    backward: float


class Time(NamedTuple):
    """Milliseconds of a loss, forward and backward."""

    computing: float
    sending: float
    seen: float  # the part of `sending` that nothing hides

    @property
    def total(self) -> float:
        """Computing, and what is seen of sending."""
        return self.computing + self.seen


def predicted(results: Path, rows: int = SIZE) -> tuple[float, float]:
    """Predicted ms of the forward and the backward pass of the CLIP loss, with `rows` rows in both towers."""
    records = read(results / "static" / "predicted-sm_90.json")
    chosen = having(records, objective="clip", n=rows, d=COLUMNS, precision="fp16")
    found = {r["pass"]: r["predicted_ms"] for r in chosen if "kernel" not in r}
    return found["fwd"], found["bwd"]


def rates(results: Path) -> Rates:
    """Predicted ms of the CLIP loss, divided by its operations."""
    square = (SIZE // 2) ** 2 * COLUMNS
    return Rates(*(ms / (own * square) for ms, own in zip(predicted(results), TRITON, strict=True)))


def link_of(world: int) -> Link:
    """The link of a number of GPUs: up to eight are one node."""
    return NODE if world <= 8 else NETWORK


def time_of(cost: Cost, speed: float, rate: Rates) -> Time:
    """Times of a rank that sends `speed` gigabytes a second."""

    def seen(one: Pass, ms: float) -> float:
        return max(0.0, one.sent / (1e6 * speed) - one.hides * ms)

    computing = cost.forward.operations * rate.forward + cost.backward.operations * rate.backward
    exposed = seen(cost.forward, rate.forward) + seen(cost.backward, rate.backward)
    return Time(computing, cost.sent / (1e6 * speed), exposed)


def least_hidden(s: Setting, link: Link, rate: Rates) -> float:
    """Samples of a rank from which on fastcl's gather takes no longer than the forward pass of its own block."""
    sent = 2 * (s.world - 1) * s.columns * s.bytes  # for each own sample
    return sent / (1e6 * link.gathers) / (TRITON[0] * s.columns * rate.forward)


def least_longer(s: Setting, link: Link, rate: Rates) -> float:
    """Samples of a rank from which on meeting the others' rows takes longer than gathering them, on any W."""
    return 2 * s.columns * s.bytes / (1e6 * link.gathers) / (4 * s.columns * (rate.forward + 2 * rate.backward))
