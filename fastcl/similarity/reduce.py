"""Adding several accumulators: what they must have in common, and the exchange between ranks of a process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from fastcl.errors import FastclError
from fastcl.similarity.sums.moments import Moments

# For each pair of models whose minibatch CKA is undefined: the first batch where it is, and why.
Undefined: TypeAlias = dict[tuple[str, str], tuple[int, str]]


def check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise FastclError unless names, kernels and minibatch are equal, and widths too if both accumulators have any."""
    for key in ("names", "kernels", "minibatch", "widths"):
        a, b = mine[key], theirs[key]
        if a != b and not (key == "widths" and not (a and b)):
            raise FastclError(f"accumulators must have the same {key}, got {a} and {b}")


def note(undefined: Undefined, more: Undefined, before: int) -> None:
    """Add the notes of batches that follow `before` others; a pair keeps its first note."""
    for pair, (batch, reason) in more.items():
        undefined.setdefault(pair, (before + batch, reason))


def has_ranks() -> bool:
    """Whether a process group exists."""
    return dist.is_available() and dist.is_initialized()


class Reducer:
    """The ranks of a group that add up their sums.

    Attributes:
        source: the first rank, within the group, that has seen samples; None if none has.
        widths: feature widths at the source.
        roundings: per kernel, the largest of any rank.
        undefined: undefined pairs of models on all ranks, with batches numbered across the ranks in order.
        device: device of this rank's tensors in the exchange.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, description: Mapping[str, Any], n: int, roundings: Sequence[float],
        device: torch.device | None, batches: int, undefined: Undefined,
    ) -> None:  # fmt: skip
        self._group = group
        facts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(facts, (dict(description), n, list(roundings), batches, undefined), group)
        seen = [rank for rank, (_, count, *_) in enumerate(facts) if count]
        self.source = seen[0] if seen else None
        self.widths = facts[seen[0]][0]["widths"] if seen else {}
        for theirs, *_ in facts:  # every rank makes the same comparisons, so all raise or none does
            check_same(facts[seen[0] if seen else 0][0], theirs)
        self.roundings = [max(values) for values in zip(*(fact[2] for fact in facts), strict=True)]
        self.undefined: Undefined = {}
        before = 0
        for *_, count, notes in facts:
            note(self.undefined, notes, before)
            before += count
        on_gpu = "nccl" in str(dist.get_backend(group))
        # NCCL needs tensors on the current GPU. Other backends: a rank without samples has no device yet and uses the
        # CPU.
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else device or torch.device("cpu")

    def pilots(self, own: Sequence[Tensor]) -> list[Tensor]:
        """The source's pilots of one kernel; there must be a source."""
        assert self.source is not None
        rank = self.source if self._group is None else dist.get_global_rank(self._group, self.source)
        sizes = list(self.widths.values())
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.device)
        if dist.get_rank(self._group) == self.source:
            flat.copy_(torch.cat(list(own)))
        dist.broadcast(flat, rank, self._group)
        return list(flat.split(sizes))

    def add_up(self, streams: Sequence[Moments], counts: Sequence[float]) -> list[float]:
        """Add all ranks' moments into the streams, whose pilots are equal on all ranks; return the summed counts."""
        sizes = [d + 3 for d in self.widths.values()]
        keys = list(combinations_with_replacement(range(len(sizes)), 2))
        parts = [torch.tensor(counts, dtype=torch.float64, device=self.device)]
        for stream in streams:
            parts.append(torch.stack(stream.swept).to(self.device))
            for i, j in keys:
                own = stream.moments(i, j) if counts[0] else parts[0].new_zeros(sizes[i], sizes[j])
                parts.append(own.to(self.device).flatten())
        total = torch.cat(parts)
        dist.all_reduce(total, group=self._group)
        found, *rest = total.split([len(part) for part in parts])
        for stream in streams:
            stream.clear()
            stream.swept = list(rest.pop(0).unbind())
            for i, j in keys:
                stream.load(i, j, rest.pop(0).view(sizes[i], sizes[j]))
        return found.tolist()
