"""A ring of stages in shared memory: one producer fills them in turn, consumers read and release them.

Stage s has two barriers. `full` completes a phase when a copy has arrived, `empty` when all its consumers have released
it. Turn i of the ring uses stage i % STAGES for the (i // STAGES)-th time. The kernels, and the model of them in the
tests, take all stages and phases from here.
"""

from typing import Any, NamedTuple

import triton


class Ring(NamedTuple):
    """Constants of a warp-specialised kernel."""

    STAGES: int
    CONSUMERS: int  # warpgroups
    REGISTERS: int  # of a thread of all consumers but the first, which has what is left


class Buffers(NamedTuple):
    """Inside a kernel: shared memory and its barriers."""

    r: Any  # resident rows
    s: Any  # streamed rows, by stage
    here: Any  # the barrier of the resident rows
    full: Any  # barriers by stage
    empty: Any


class Turns(NamedTuple):
    """Inside a kernel: a program's plain tiles of its `walk`, and the first of its resident rows."""

    walk: Any
    first: Any
    last: Any  # + 1
    start_r: Any


@triton.jit
def stage(i, RING):
    """Where turn i takes place."""
    return i % RING.STAGES


@triton.jit
def filled(i, RING):
    """Phase of `full` that a consumer waits for in turn i."""
    return (i // RING.STAGES) & 1


@triton.jit
def released(i, RING):
    """Phase of `empty` that the producer waits for in turn i. A new barrier counts as having completed phase 1, so the
    first STAGES turns do not wait."""
    return ((i // RING.STAGES) & 1) ^ 1
