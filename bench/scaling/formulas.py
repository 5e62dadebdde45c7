"""What a rank sends, holds and computes for the CLIP loss of a global batch: fastcl's gather, a ring, plain gathers.

N samples, two towers with D columns, W ranks with n = N / W samples each. Rows have b bytes a number. All-gathers and
reduce-scatters are rings: a rank sends W - 1 blocks of n rows. Operations are those of matrix products, two for a
multiplication and an addition. The tests count them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastcl.rowstats.meeting import SLICE

WORDS = 664  # bytes in which a rank tells its number of rows and its arguments
# Operations of the own block in units of n n D, forward and backward. The Triton kernels compute one product forward,
# and backward the logits and a gradient for each tower; up to 256 columns, which these tables do not have, the logits
# for each tower: 8. PyTorch in tiles computes each direction by itself.
TRITON, TORCH = (2, 6), (4, 12)


class Setting(NamedTuple):
    """A batch on several GPUs."""

    samples: int  # N, a multiple of W
    world: int  # W
    columns: int = 512  # D
    bytes: int = 2  # b

    @property
    def own(self) -> int:
        """n: samples of a rank."""
        return self.samples // self.world

    @property
    def others(self) -> int:
        """N - n: samples of all other ranks."""
        return self.samples - self.own

    @property
    def block(self) -> int:
        """n D: numbers in one tower's rows of a rank."""
        return self.own * self.columns


class Pass(NamedTuple):
    """What a rank does in the forward or in the backward pass."""

    sent: int  # bytes
    operations: int
    hides: int  # operations that do not wait for what is sent


class Cost(NamedTuple):
    """What a loss costs a rank."""

    forward: Pass
    backward: Pass
    held: int  # bytes kept for the backward pass: gathered rows, copies of rows, logits; with slices those of a slice

    @property
    def sent(self) -> int:
        """Bytes of both passes."""
        return self.forward.sent + self.backward.sent

    @property
    def operations(self) -> int:
        """Operations of both passes."""
        return self.forward.operations + self.backward.operations


def fastcl(s: Setting, own: tuple[int, int] = TRITON) -> Cost:
    """`fastcl.clip_loss(gather_distributed=True)`.

    The rows travel while the own block is computed, and are held with the kernels' working copy. If a tower's rows are
    more than SLICE bytes, they travel in slices, one after the other, and again in the backward pass, which computes
    their statistics once more.

    Args:
        own: TRITON or TORCH.
    """
    rows, meet = 2 * s.others * s.columns * s.bytes, 2 * s.own * s.others * s.columns
    square = s.own**2 * s.columns
    forward = Pass(rows + WORDS * (s.world - 1), own[0] * square + 2 * meet, own[0] * square)
    backward = Pass(2 * 5 * 4 * s.others, own[1] * square + 4 * meet, 0)
    if s.samples * s.columns * s.bytes <= SLICE:
        return Cost(forward, backward, 2 * rows if own is TRITON else rows)
    again = Pass(backward.sent + rows, backward.operations + 2 * meet, 0)
    return Cost(forward._replace(hides=0), again, 2 * SLICE)


def ring(s: Setting) -> Cost:
    """Inf-CL: one ring for each direction, in float32. Keys travel forward; keys and their gradients backward.

    Its kernels compute the logits again for the gradient of the queries and for that of the keys.
    """
    meet, block = 2 * s.own * s.samples * s.columns, 4 * s.block
    forward = Pass(2 * (s.world - 1) * block, 2 * meet, 2 * meet)
    return Cost(forward, Pass(2 * (2 * s.world - 1) * block, 8 * meet, 8 * meet), 4 * block)


def plain(local: bool, with_gradient: bool) -> Callable[[Setting], Cost]:
    """Gathers as open_clip offers them: rows are gathered and the logits are stored, with their softmax in float32.

    Args:
        local: own rows against all (`local_loss`), instead of all rows against all on every rank.
        with_gradient: the gathered rows have a gradient (`gather_with_grad`), which a reduce-scatter brings home.
    """

    def cost(s: Setting) -> Cost:
        rows = 2 * s.others * s.columns * s.bytes
        anchors, directions = (s.own, 2) if local else (s.samples, 1)
        product = 2 * anchors * s.samples * s.columns
        gradients = directions * (2 if with_gradient or not local else 1)
        held = 2 * s.samples * s.columns * s.bytes + 2 * 4 * anchors * s.samples
        forward = Pass(rows, directions * product, 0)
        return Cost(forward, Pass(rows if with_gradient else 0, gradients * product, 0), held)

    return cost


class Method(NamedTuple):
    """A way to compute the loss, and its formulas as the page shows them, without slices; `*` is left out there."""

    cost: Callable[[Setting], Cost]
    gradient: str  # of the weights, after the average over the ranks
    sent: str
    held: str
    operations: str


LOCAL = plain(local=True, with_gradient=True)
METHODS = {
    "fastcl": Method(
        fastcl, "exact", "(2*D*b + 40) * (N - n) + 664*(W - 1)", "4*D*b * (N - n)", "8*n*n*D + 12*n*D * (N - n)"
    ),
    "Inf-CL's ring": Method(ring, "exact", "8*n*D * (3*W - 2)", "16*n*D", "20*n*N*D"),
    "open_clip, local_loss and gather_with_grad": Method(
        LOCAL, "exact", "4*D*b * (N - n)", "2*N*D*b + 8*n*N", "12*n*N*D"
    ),
    "open_clip, gather_with_grad": Method(
        plain(False, True), "exact", "4*D*b * (N - n)", "2*N*D*b + 8*N*N", "6*N*N*D"
    ),
    "open_clip, local_loss": Method(
        plain(True, False), "another direction", "2*D*b * (N - n)", "2*N*D*b + 8*n*N", "8*n*N*D"
    ),
    "open_clip, neither": Method(
        plain(False, False), "1 / W of it", "2*D*b * (N - n)", "2*N*D*b + 8*N*N", "6*N*N*D"
    ),
}  # fmt: skip
