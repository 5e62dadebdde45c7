"""What the ranks of a loss compare before any rows travel: their arguments and numbers of rows.

Compiled code compares at run time, in `torch.ops.fastcl.agree`. It returns the ranks' numbers of rows, an argument of
all that sends rows (`at_run_time`): they leave only once the ranks agree. Arguments are checked while code is compiled,
when the other ranks may already run theirs. So a refusal is an operator as well, which tells them at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastcl.dispatch import choose
from fastcl.errors import FastclError
from fastcl.exchange import Ranks, told
from fastcl.facts import A_TENSOR
from fastcl.rowstats.at_run_time import RanksAtRunTime
from fastcl.rowstats.meeting import Options
from fastcl.rowstats.registration import KEEPS_ORDER, keep_order, refuse_second, register
from fastcl.rowstats.request import Batch
from fastcl.rowstats.triton.operator import operator_arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Request: TypeAlias = tuple[Batch, Options]

_library = torch.library.Library("fastcl", "FRAGMENT")
_library.define(
    "agree(Tensor x, SymInt[] counts, str facts, str numbers, str names, Tensor[] values, int rank, int world, "
    "str group, str device) -> (Tensor, Tensor)"
)
_library.define("refuse(Tensor nothing, str text, int rank, int world, str group, str device) -> Tensor")


def agreed(
    request: Callable[[], Request], facts: Mapping[str, object], group: ProcessGroup | None
) -> tuple[Batch, Options, tuple[Ranks, ...]] | Tensor:
    """The batch, its options, and the ranks of the anchors and, with candidates, of those.

    In compiled code that `request` refuses, a tensor () instead, to be returned in place of any result. Code that
    computes it raises the error on every rank.

    Args:
        request: checks this rank's arguments. If it raises, every rank raises.
        facts: what all ranks must have in common, besides the options; may be filled by `request`. Numbers are as
            `number` returns them.
    """
    ranks = Ranks.of(group)
    place = ranks.rank, ranks.world, ranks.group, ranks.device
    try:
        batch, options = request()
        if choose(batch.x) == "triton":  # what None stands for may depend on a rank's autocast
            precision = operator_arguments(1.0, options.precision, batch.x)[2]
            options = Options(options.temperature, options.normalize, options.columns, precision)
        x, y = batch.x, batch.y
        counts = len(x) * (1 if batch.x2 is None else 2), *(() if y is None else (len(y),))
        spelled = _spelled({**facts, **_common(batch, options)})
    except Exception as error:
        if torch.compiler.is_compiling():
            return torch.ops.fastcl.refuse(torch.empty(0, dtype=torch.float32, device="cpu"), told(error), *place)
        raise ranks.refuse(error) from error
    if not torch.compiler.is_compiling():
        return batch, options, ranks.agree(counts, *_told(x, *spelled))
    if ranks.world == 1:
        return batch, options, tuple(replace(ranks, sizes=(count,)) for count in counts)
    sizes, weights = torch.ops.fastcl.agree(x.detach(), list(counts), *spelled, *place)
    sides = zip(sizes.unbind(), weights.unbind(), strict=True)
    return batch, options, tuple(RanksAtRunTime(ranks.group, ranks.rank, ranks.world, (), "", *one) for one in sides)


def number(value: float | Tensor) -> float | Tensor:
    """A number as one of the facts that ranks compare."""
    return value.detach() if isinstance(value, Tensor) else float(value)


def _common(batch: Batch, options: Options) -> dict[str, object]:
    """What all ranks must have in common."""
    x, y = batch.x, batch.y
    given = {"rows": x, "second rows": batch.x2, "candidates": y, "temperature": options.tensor()}
    wanted = [name for name, v in given.items() if torch.is_grad_enabled() and v is not None and v.requires_grad]
    return {
        "temperature": number(options.temperature), "dtype": x.dtype, "device": x.device.type,
        "labels": "labels" if batch.labels is not None else "no labels",
        "y": "candidates y" if y is not None else "no y", "normalize": options.normalize, "columns": options.columns,
        "precision": options.precision, "backend": choose(x), "need of gradients": ", ".join(wanted) or "none",
        "torch.compile": "compiled" if torch.compiler.is_compiling() else "not compiled",
    }  # fmt: skip


def _spelled(facts: Mapping[str, object]) -> tuple[str, str, str, list[Tensor]]:
    """Facts as the operator takes them, one a line: in words, numbers, and names of those that are tensors; these."""
    words, numbers, names, values = [], [], [], []
    for name, value in facts.items():
        if isinstance(value, Tensor):
            names.append(name)
            values.append(value)
        else:
            (numbers if isinstance(value, float) else words).append(f"{name}: {value}")
    return "\n".join(words), "\n".join(numbers), "\n".join(names), values


def _told(
    x: Tensor, words: str, numbers: str, names: str, values: Sequence[Tensor]
) -> tuple[str, dict[str, Tensor]]:  # fmt: skip
    """All facts as `facts.packed` takes them: numbers in words, whether they are tensors or not, but for those on a
    GPU."""
    tensors = dict(zip(names.splitlines(), values, strict=True))
    there = {name: value for name, value in sorted(tensors.items()) if not _is_here(value)}
    read = [f"{name}: {A_TENSOR if name in there else float(value)}" for name, value in tensors.items()]
    lines = sorted([*numbers.splitlines(), *read, f"number of columns: {x.shape[1]}"])
    return "\n".join([words, *lines]), there


def _is_here(value: Tensor) -> bool:
    """Whether a tensor can be read without waiting for its device."""
    return value.device.type == "cpu"


def _forward(x: Tensor, counts: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    """Numbers of rows, on the CPU, and weights of shares, float64 on x's device: one row for each of the counts."""
    *spelled, rank, world, group, device = rest
    sides = Ranks(group, rank, world, device=device).agree(counts, *_told(x, *spelled))
    uneven = [side.sizes for side in sides if len(set(side.sizes)) > 1]
    if uneven and not KEEPS_ORDER:
        raise FastclError(
            f"with this version of PyTorch a compiled loss with gather_distributed=True needs the same number of rows "
            f"on all ranks, got {', '.join(map(str, uneven[0]))} on ranks 0 to {world - 1}; for these, call it outside "
            f"of torch.compile (inside: torch.compiler.disable)"
        )
    weights = [side.weight for side in sides]
    sizes = torch.tensor([side.sizes for side in sides], dtype=torch.int64, device="cpu")
    return sizes, torch.tensor(weights, dtype=torch.float64, device=x.device)


def _fake(x: Tensor, counts: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor]:
    sizes = torch.empty(len(counts), rest[-3], dtype=torch.int64, device="cpu")
    return sizes, x.new_empty(len(counts), dtype=torch.float64)


def _refuse(_: Tensor, text: str, rank: int, world: int, group: str, device: str) -> Tensor:
    raise Ranks(group, rank, world, device=device).refuse(FastclError(text))


def _refuse_fake(nothing: Tensor, *_: Any) -> Tensor:
    return nothing.new_empty(())


register(_library, "agree", _forward, _fake, refuse_second)
register(_library, "refuse", _refuse, _refuse_fake, refuse_second)
keep_order(_library, "agree", "refuse")
