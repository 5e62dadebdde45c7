"""One forward and backward pass of every kind of kernel: what the sanitizer watches and bench/gpu/repeat.py repeats."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fastcl
from bench.harness.command import Parser
from bench.losses.providers import OBJECTIVES, fused

# Rows and widths; rows of the second width do not fit one program. "tiny" is for the interpreter.
SCALES = {"tiny": (40, (16, 272)), "small": (300, (64, 320)), "full": (4096, (128, 512))}


@dataclass(frozen=True)
class Case:
    """A loss of the leaf z, computed by `forward`."""

    name: str
    forward: Callable[[], Tensor]
    z: Tensor

    def run(self) -> tuple[Tensor, Tensor]:
        """The loss and its gradient."""
        loss = self.forward()
        return loss.detach(), torch.autograd.grad(loss, self.z)[0]


def cases(scale: str, device: torch.device) -> Iterator[Case]:
    """The cases of a scale on a device.

    NT-Xent at both widths and precisions; the other objectives at the first width, CLIP also with a learnable
    temperature, for which the range of the logits is not known in advance.
    """
    n, widths = SCALES[scale]
    labels = torch.arange(n // 2, device=device) % 7
    for half in (True, False):
        for d in widths:
            z = torch.randn(n, d, generator=torch.Generator().manual_seed(d)).to(device).requires_grad_()
            for objective in OBJECTIVES if d == widths[0] else OBJECTIVES[:1]:
                name = f"{objective} {'fp16' if half else 'fp32'} n={n} d={d}"
                yield Case(name, partial(fused, half, z, labels, objective), z)
                if objective == "clip":
                    factor = z.new_full((), 100.0).requires_grad_()
                    yield Case(f"{name}, learnable temperature", partial(learnable, half, factor, z), z)


def learnable(half: bool, scale: Tensor, z: Tensor) -> Tensor:
    """CLIP loss with a learnable scale."""
    with fastcl.backend("triton"), torch.autocast(z.device.type, torch.float16, enabled=half):
        return fastcl.clip_loss(*z.chunk(2), scale)


def main(argv: list[str] | None = None) -> int:
    """Run all cases once; return 1 if a loss or gradient is not finite, else 0."""
    parser = Parser("gpu.workload", [__doc__ or ""])
    parser.add_argument("--scale", choices=SCALES, required=True, help="sizes; tiny is for the interpreter")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = 0
    for case in cases(parser.parse_args(argv).scale, device):
        finite = all(bool(found.isfinite().all()) for found in case.run())
        print(f"{case.name}: {'finite' if finite else 'NOT FINITE'}", flush=True)
        status |= not finite
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
