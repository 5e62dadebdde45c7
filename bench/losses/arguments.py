"""The command line of the losses benchmark."""

from __future__ import annotations

import argparse

import torch

from bench.harness.records import MEMORY_HELP, add_arguments, check_out, device_of, memory_limit, require_positive
from bench.losses.providers import OBJECTIVES, PROVIDERS, TOLERANCES

SIZES = {
    "cpu": (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    "cuda": (512, 4096, 16384, 65536, 262144, 1048576),
}

_DESCRIPTION = f"""\
Time and memory of the contrastive losses, forward and backward, against what a user would write or install otherwise.

providers, all in one run and interleaved, so that a drift of the machine hits all alike:
  fastcl chunked           the torch backend, float32: the functions of two views; of few rows the gradient comes with
                           the forward pass
  fastcl fp16, fastcl fp32 the Triton backend on float32 rows, its two precisions; CUDA, or a CPU's interpreter
  fastcl dense             fastcl.backend("dense"): the specification, N x N, not meant to be fast; on a CPU only
  plain PyTorch            normalise, one matrix product, masks, cross entropy or log-sum-exp; also under autocast to
                           bfloat16, and that with torch.compile (CUDA only)
  chunked bf16             PyTorch in chunks of rows, recomputed in the backward pass
  flex_attention bf16      its log-sum-exp, compiled (CUDA only)
  Inf-CL, cut-cross-entropy, lightly, pytorch-metric-learning
                           those installed: pip install '.[peers]'
  authors' formulation     similarities over an N x N x D broadcast, as in the code published with arXiv 2510.08852

Before they are timed, all must agree with the first that runs on the loss and its gradient, to
{", ".join(f"{tolerance:g} ({name})" for name, tolerance in TOLERANCES.items())} by the precision of their products.
One that does not is not timed, and if it is no other library the exit status is 1. A case that does not fit (--memory,
--seconds) is recorded with the reason instead of times.
"""
_EPILOG = """\
examples:
  python -m bench.losses --out runs/bench                          the whole table
  python -m bench.losses --out runs/try --n 512 --repeats 5        a first look
  python -m bench.losses --out runs/try --providers "fastcl chunked" "plain PyTorch" --repeats 25 --seconds 10
                                                                   the two on all sizes, some 7 minutes on a CPU

DIR/losses.json holds every single time, DIR/losses.md the tables, DIR/losses.svg the figure of NT-Xent where matplotlib
is installed and a width has two sizes; they are rewritten after each objective and size, so a run that is stopped keeps
what it has. For numbers worth quoting leave the machine to the run alone: other processes
on the same cores change not only the times but their ratios. Where they cannot be stopped, OMP_NUM_THREADS=1 makes
the times steadier: with several threads each waits for the slowest.
"""


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, torch.device]:
    """The arguments, with defaults that fit the device, and the device; exits with a message if they are invalid."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.losses", description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [p.name for p in PROVIDERS]
    add_arguments(parser)
    # fmt: off
    parser.add_argument("--n", type=int, nargs="+", metavar="N",
        help="rows: two views of N / 2 samples, even, at least 8 (default: "
        + "; ".join(f"{kind}: {' '.join(map(str, sizes))}" for kind, sizes in SIZES.items()) + ")")
    parser.add_argument("--d", type=int, nargs="+", default=[128], metavar="D", help="widths of rows (default: 128)")
    parser.add_argument("--memory", type=float, metavar="GIB", help=MEMORY_HELP)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="NAME",
        help=f"default: all, {' '.join(OBJECTIVES)}")
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help="default: all")
    # fmt: on
    args = parser.parse_args(argv)
    device = device_of(args, parser)
    args.n = args.n or list(SIZES[device.type])
    args.memory = memory_limit(args.memory, device)
    if bad := [n for n in args.n if n < 8 or n % 2]:
        parser.error(f"--n: rows must be even and at least 8, got {bad[0]}")
    check_out(args, parser)
    require_positive(parser, args, "d", "repeats", "seconds", "memory")
    return args, device
