"""How float32 rows may be split for tensor cores: the error of each way, found by rounding in float64, and its price.

Run it with `python -m bench.losses.splits --out DIR`. Operands are rounded as each way stores them; products and sums
are exact. So the errors are those of the operands alone, the same on every machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from bench.harness.command import Command
from bench.harness.records import Record, digits, having, table, write
from bench.static.predict.assumptions import Machine

ALLOWED = 1e-5  # relative error of gradients of float32 rows, as docs/losses.md states it
SCALE = 256.0  # of entries stored in float16, as in kernels/common/numerics.py
N, D = 65_536, 128  # of the times

_TEXTS = (
    "Errors of a loss's gradient if float32 rows are multiplied in parts of lower precision, and what that costs.",
    "Writes splits.json and splits.md. Takes a minute or two and times nothing.",
)


class Way(NamedTuple):
    """Products of parts that stand for one product of float32 blocks.

    Args:
        kind: the format of the parts.
        pairs: which part of the left operand meets which of the right; part 1 is the remainder of part 0.
        cost: time of all products, in products of float16.
    """

    kind: str
    pairs: tuple[tuple[int, int], ...]
    cost: float


_THREE = ((0, 0), (0, 1), (1, 0))
WAYS = {
    "fp16, one product": Way("fp16", _THREE[:1], 1),
    "fp16, remainder of one side": Way("fp16", ((0, 0), (1, 0)), 2),
    "fp16, remainders in fp8": Way("fp16 and fp8", _THREE, 2),
    "fp16, three products": Way("fp16", _THREE, 3),
    "bf16, three products": Way("bf16", _THREE, 3),
    "bf16, six products": Way("bf16", (*_THREE, (1, 1), (0, 2), (2, 0)), 6),
    "tf32, one product": Way("tf32", _THREE[:1], 2),
    "tf32, three products": Way("tf32", _THREE, 6),
}
KERNELS = "fp16, three products"  # what `precision="fp32"` does


class Case(NamedTuple):
    """Rows of two views and a temperature; `noise` is the second view's distance from the first, in units of a row."""

    n: int
    d: int
    temperature: float
    noise: float


CASES = tuple(Case(1024, d, t, noise) for d, t, noise in product((32, 128, 512), (0.5, 0.1, 0.05), (0.1, 10.0)))


def unit_rows(case: Case) -> Tensor:
    """(N, D) float32 unit rows as float64; rows k and k + N / 2 are views of one sample."""
    generator = torch.Generator().manual_seed(0)
    first, noise = torch.randn(2, case.n // 2, case.d, generator=generator, dtype=torch.float64)
    rows = torch.cat([first, first + case.noise * noise])
    return (rows / rows.norm(dim=1, keepdim=True)).float().double()


def multiply(a: Tensor, b: Tensor, way: Way) -> Tensor:
    """a b with the rounding of `way`."""
    if way.kind == "fp16 and fp8":
        (high_a, low_a), (high_b, low_b) = (_parts(v, "fp16", 2) for v in (a, b))
        return high_a @ high_b + _fp8(high_a) @ _fp8(low_b) + _fp8(low_a) @ _fp8(high_b)
    count = 1 + max(map(max, way.pairs))
    left, right = _parts(a, way.kind, count), _parts(b, way.kind, count)
    return sum((left[i] @ right[k] for i, k in way.pairs[1:]), start=left[0] @ right[0])


def errors(case: Case, way: Way) -> tuple[float, float]:
    """Relative error of NT-Xent's loss, and of its gradient in the rows in Euclidean norm."""
    (loss, gradient), (want_loss, want) = (ntxent(unit_rows(case), case.temperature, w) for w in (way, None))
    return (abs(loss - want_loss) / want_loss).item(), ((gradient - want).norm() / want.norm()).item()


def ntxent(u: Tensor, temperature: float, way: Way | None) -> tuple[Tensor, Tensor]:
    """NT-Xent of unit rows and its gradient, as the kernels form them: the views' logits apart and in full precision,
    both products by `way` (None: exact)."""
    times: Callable[[Tensor, Tensor], Tensor] = torch.matmul if way is None else lambda a, b: multiply(a, b, way)
    n = len(u)
    row, partner = torch.arange(n), torch.arange(n).roll(n // 2)
    others = times(u, u.T) / temperature
    others[row, row] = others[row, partner] = -torch.inf
    lse, view = others.logsumexp(1), (u * u[partner]).sum(1) / temperature
    share = torch.sigmoid(lse - view) / n  # derivative of the loss by the log-sum-exp
    weights = share[:, None] * (others - lse[:, None]).exp()
    weights = (weights + weights.T) / share.max()
    pulled = times(weights, u) * share.max() - (share + share[partner])[:, None] * u[partner]
    gradient = (pulled - (pulled * u).sum(1, keepdim=True) * u) / temperature
    return softplus(lse - view).mean(), gradient


def _parts(x: Tensor, kind: str, count: int) -> list[Tensor]:
    """x rounded, its remainder rounded, and so on."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(_ROUNDED[kind](x))
        x = x - found[-1]
    return found


def _tf32(x: Tensor) -> Tensor:
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def _fp8(x: Tensor) -> Tensor:
    """x in E4M3, scaled by a power of two so that its largest entry is in range."""
    scale = 2.0 ** math.floor(math.log2(448 / x.abs().max().item()))
    return (x * scale).to(torch.float8_e4m3fn).double() / scale


_ROUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: (x * SCALE).half().double() / SCALE,
    "bf16": lambda x: x.bfloat16().double(),
    "tf32": _tf32,
}


def tensor_ms(way: Way) -> float:
    """Computed time of NT-Xent's products at N, D on sm_90, forward and backward, if nothing else took any."""
    return 5 * N * N * D * way.cost / (Machine().roof * 1e12) * 1e3


def measured(cases: Sequence[Case]) -> Iterator[Record]:
    """A record for every way and case."""
    for (name, way), case in product(WAYS.items(), cases):
        loss, gradient = errors(case, way)
        yield {"bench": "splits", "way": name, **case._asdict(), "loss_error": loss, "gradient_error": gradient}


def report(records: Sequence[Record]) -> str:
    """The largest errors of every way, and its price."""
    rows = []
    for name, way in WAYS.items():
        of_way = having(records, way=name)
        loss, gradient = (max(r[key] for r in of_way) for key in ("loss_error", "gradient_error"))
        kept = f"**{name}**" if name == KERNELS else name
        fits = "yes" if gradient <= ALLOWED else "no"
        rows.append([kept, f"{loss:.1e}", f"{gradient:.1e}", fits, f"{way.cost:g}", digits(tensor_ms(way))])
    head = ["products", "error of the loss", "of the gradient", f"at most {ALLOWED:g}", "cost", "computed ms"]
    return table(head, rows, left=1)


def main(argv: list[str] | None = None) -> int:
    """Compute and write the table; return the exit status."""
    args = Command("losses.splits", _TEXTS).parse(argv)
    records = list(measured(CASES))
    text = report(records)
    write(args.out, "splits", records, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
