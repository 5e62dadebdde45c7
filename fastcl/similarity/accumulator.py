"""Pair statistics of several models from one streaming pass over their features: any n, no n x n matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcl.dispatch import on_triton
from fastcl.errors import FastclError
from fastcl.similarity.reduce import Reducer, Undefined, check_same, has_ranks, note
from fastcl.similarity.results import AllPairs, PairResult
from fastcl.similarity.stats import Overflown, PairStats
from fastcl.similarity.sums.features import checked
from fastcl.similarity.sums.forms import ADDITIVE
from fastcl.similarity.sums.moments import Moments, chunk_rows
from fastcl.similarity.sums.routes import statistics
from fastcl.similarity.sums.rows import INNER, Inner

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PairAccumulator:
    """CKA, debiased CKA, RSA and drifts of all pairs of models from one streaming pass over their features.

    Sums are kept in float64 on the device of the first batch: 8 (d_x + 3)(d_y + 3) bytes for each kernel and each of
    the M(M+1)/2 pairs (including a model with itself), plus the rows of an incomplete chunk. The same samples in the
    same order give the same bits, however they are split into batches.

    Args:
        names: distinct names of at least two models; their order is the order of the keys of pairs.
        kernels: any of "linear", "cosine" and "correlation", see `fastcl.pair_stats`; cost grows with their number.
        minibatch: also accumulate minibatch CKA of the linear kernel; each `update` is one batch of at least 4
            samples.

    Raises:
        FastclError: for fewer than two names, a repeated name, or an unknown or repeated kernel.
    """

    def __init__(self, names: Sequence[str], kernels: Sequence[Inner] = INNER, minibatch: bool = False) -> None:
        for what, values in (("names", names), ("kernels", kernels)):
            listed = isinstance(values, Sequence) and not isinstance(values, str)
            if not listed or not all(isinstance(value, str) for value in values):
                raise FastclError(f"{what} must be a sequence of strings, got {values!r}")
        self.names, self.kernels = tuple(names), tuple(kernels)
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise FastclError(f"names must be at least two distinct model names, got {self.names}")
        if not self.kernels or set(self.kernels) - set(INNER) or len(set(self.kernels)) < len(self.kernels):
            raise FastclError(f"kernels must be distinct kernels from {INNER}, got {self.kernels}")
        self._widths: dict[str, int] = {}
        self._device: torch.device | None = None
        self._streams = [Moments(kernel) for kernel in self.kernels]
        self._pending: list[list[Tensor]] = []  # per piece, per model: rows of an incomplete chunk
        self._minibatch = minibatch
        self._reset_counts()

    @torch.inference_mode()
    def update(self, features: Mapping[str, Tensor]) -> None:
        """Add one batch; if this raises, nothing is added.

        Args:
            features: per name, (b, d_name) features of the same b samples in the same order; any floating dtype and
                device. Batches may differ in b. Kernels that normalise rows leave a zero row at zero: its cosine with
                every sample is 0.

        Raises:
            FastclError: on missing or unknown names, unequal numbers of rows, a width that differs from the previous
                batch, a shape that is not (b, d), a dtype that is not floating, features that are not finite, and,
                with minibatch, a batch of fewer than 4 samples.
        """
        if not isinstance(features, Mapping):
            raise FastclError(f"features must map the names {self.names} to tensors, got {type(features).__name__}")
        missing = [name for name in self.names if name not in features]
        unknown = [name for name in features if name not in self.names]
        if missing or unknown:
            raise FastclError(f"features must have the keys {self.names}: missing {missing}, unknown {unknown}")
        batch = checked({name: features[name] for name in self.names}, self.n, self._device)
        # Raise before anything is added if a backend chosen by name cannot take these features or the pending ones.
        on_triton(*batch, *(x for piece in self._pending for x in piece))
        widths = {name: x.shape[1] for name, x in zip(self.names, batch, strict=True)}
        if self._widths and widths != self._widths:
            raise FastclError(f"feature widths changed from {self._widths} to {widths} at sample {self.n}")
        rows = len(batch[0])
        if rows == 0:
            return
        if self._minibatch:
            self._add_minibatch(batch)
            self._batches += 1
        self._widths, self._device = widths, batch[0].device
        self._take(batch)
        self.n += rows

    def _take(self, batch: list[Tensor]) -> None:
        """Add all complete chunks; keep the remaining rows."""
        chunk = chunk_rows(batch[0])
        held = sum(len(piece[0]) for piece in self._pending)
        start, rows = 0, len(batch[0])
        while held + rows - start >= chunk:
            stop = start + chunk - held
            self._pending.append([x[start:stop] for x in batch])
            self._flush()
            held, start = 0, stop
        if start < rows:
            self._pending.append([x[start:].clone() for x in batch])  # the caller may reuse its buffer

    def _joined(self) -> list[Tensor]:
        """The rows of the incomplete chunk, per model."""
        return [p[0] if len(p) == 1 else torch.cat(p) for p in zip(*self._pending, strict=True)]

    def _flush(self) -> None:
        batch = self._joined()
        for stream in self._streams:
            stream.add(batch)
        self._pending = []

    def _whole(self) -> Iterator[Moments]:
        """Streams of all rows so far. An incomplete chunk goes into a copy, since later batches continue it; streams
        are copied one at a time to save memory."""
        for stream in self._streams:
            yield stream.with_rows(self._joined()) if self._pending else stream

    def _add_minibatch(self, batch: list[Tensor]) -> None:
        rows = len(batch[0])
        if rows < 4:
            raise FastclError(f"minibatch CKA needs batches of at least 4 samples, got {rows} at sample {self.n}")
        for (a, x), (b, y) in combinations(zip(self.names, batch, strict=True), 2):
            try:
                found = statistics(x, y, "linear").hsic1_form()
                found.self_terms("minibatch CKA", ADDITIVE)
            except FastclError as error:  # one failing pair must not stop the others
                self._undefined.setdefault((a, b), (self._batches, str(error)))
            else:
                self._hsic1[a, b] = _plus(self._hsic1[a, b], found)

    @torch.inference_mode()
    def compute(self) -> AllPairs:
        """Statistics of all samples so far; more batches may follow.

        Raises:
            FastclError: if no sample was added. If the sums of a pair overflow float64, its measures raise instead.
        """
        if self.n == 0:
            raise FastclError(f"no features were added for {self.names}: n=0")
        found: dict[tuple[str, str], dict[Inner, PairStats]] = {pair: {} for pair in combinations(self.names, 2)}
        for stream in self._whole():
            for (i, j), values, strains in stream.pair_sums():
                given = self.n, stream.kernel, values, stream.rounding, strains
                try:
                    stats = PairStats.unpacked(*given)
                except FastclError:
                    stats = Overflown.unpacked(*given)
                found[self.names[i], self.names[j]][stream.kernel] = stats
        return AllPairs(self.names, self.n, {pair: self._result(pair, stats) for pair, stats in found.items()})

    def _result(self, pair: tuple[str, str], stats: dict[Inner, PairStats]) -> PairResult:
        if pair not in self._hsic1:
            return PairResult(stats)
        a, b, c = (value / self._batches for value in self._hsic1[pair])
        batch, reason = self._undefined.get(pair, (0, ""))
        return PairResult(stats, (a, b, c), f"batch {batch} of {self._batches}: {reason}" if reason else None)

    @torch.inference_mode()
    def merge(self, other: PairAccumulator) -> None:
        """Add another accumulator's samples of the same models; up to rounding as if this one had seen them all.

        Args:
            other: has the same names, kernels and minibatch; on any device; not modified.

        Raises:
            FastclError: other is not a PairAccumulator, or the two differ in names, kernels, minibatch or widths.
        """
        if not isinstance(other, PairAccumulator):
            raise FastclError(f"other must be a PairAccumulator, got {type(other).__name__}")
        check_same(self._description(), other._description())
        if other.n == 0:
            return
        self._widths, self._device = other._widths, self._device or other._device
        if self._pending:
            self._flush()
        for own, stream in zip(self._streams, other._whole(), strict=True):
            own.merge(stream.to(self._device))
        note(self._undefined, other._undefined, self._batches)
        self._add_counts(other._counts())

    @torch.inference_mode()
    def all_reduce(self, group: ProcessGroup | None = None) -> None:
        """Merge the accumulators of all ranks: afterwards each rank holds the statistics of all samples.

        The sums of all pairs and kernels travel in one all-reduce, after a small exchange of widths and pilots. A rank
        may have seen no sample. Call it once, at the end: a second call would add everything again. Without a process
        group it does nothing.

        Args:
            group: of torch.distributed; None: the default group.

        Raises:
            FastclError: on every rank, if ranks differ in names, kernels, minibatch or widths.
        """
        if not has_ranks():
            return
        whole = list(self._whole())
        roundings = [stream.rounding for stream in whole]
        ranks = Reducer(group, self._description(), self.n, roundings, self._device, self._batches, self._undefined)
        if ranks.source is None:
            return
        streams = []
        for k, kernel in enumerate(self.kernels):
            streams.append(Moments(kernel))
            streams[k].rounding = ranks.roundings[k]
            streams[k].start(ranks.pilots(whole[k].pilots))
            if self.n:
                streams[k].merge(whole[k])
        counts = self._counts()
        self._streams, self._pending = streams, []
        self._widths, self._device = ranks.widths, ranks.device
        self._reset_counts()
        self._undefined = ranks.undefined
        self._add_counts(ranks.add_up(streams, counts))

    def state_dict(self) -> dict[str, Any]:
        """The whole state, for `torch.save` (and `torch.load` with weights_only=True)."""
        pending = self._joined() if self._pending else []
        streams = [stream.state() for stream in self._streams]
        undefined = [[*pair, *noted] for pair, noted in self._undefined.items()]
        found = {"counts": self._counts(), "pending": pending, "streams": streams, "undefined": undefined}
        return {**self._description(), **found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; on a CPU the result is bit-identical to an uninterrupted run.

        Raises:
            FastclError: state is not a state_dict or has other names, kernels or minibatch, or this accumulator has
                seen samples.
        """
        if self.n:
            raise FastclError(f"load_state_dict needs a new PairAccumulator, but this one has seen {self.n} samples")
        if not isinstance(state, Mapping):
            raise FastclError(f"state must be the state_dict of a PairAccumulator, got {type(state).__name__}")
        absent = {"names", "kernels", "minibatch", "widths", "counts", "pending", "streams"} - set(state)
        if absent:
            raise FastclError(f"state is not a state_dict of a PairAccumulator: missing {sorted(absent)}")
        check_same(self._description(), state)
        self._widths = dict(state["widths"])
        self._streams = [Moments.of_state(k, s) for k, s in zip(self.kernels, state["streams"], strict=True)]
        self._pending = [list(state["pending"])] if state["pending"] else []
        held = [t for s in self._streams for t in s.pilots] + list(state["pending"])
        self._device = held[0].device if held else None
        self._add_counts(state["counts"])
        self._undefined = {(a, b): (batch, reason) for a, b, batch, reason in state.get("undefined", ())}

    def _description(self) -> dict[str, Any]:
        """What two accumulators must have in common; widths are empty before the first sample."""
        return {
            "names": list(self.names), "kernels": list(self.kernels), "minibatch": self._minibatch,
            "widths": dict(self._widths),
        }  # fmt: skip

    def _counts(self) -> list[float]:
        """Numbers of samples and batches, then the HSIC_1 sums of each pair."""
        return [float(self.n), float(self._batches)] + [v for sums in self._hsic1.values() for v in sums]

    def _reset_counts(self) -> None:
        self.n = self._batches = 0
        self._undefined: Undefined = {}
        pairs = combinations(self.names, 2) if self._minibatch else ()
        self._hsic1: dict[tuple[str, str], tuple[float, float, float]] = dict.fromkeys(pairs, (0.0, 0.0, 0.0))

    def _add_counts(self, counts: Sequence[float]) -> None:
        self.n += round(counts[0])
        self._batches += round(counts[1])
        for k, (pair, sums) in enumerate(self._hsic1.items()):
            at = 2 + 3 * k
            self._hsic1[pair] = _plus(sums, counts[at : at + 3])


def _plus(sums: tuple[float, float, float], more: Sequence[float]) -> tuple[float, float, float]:
    """Add the first three numbers of `more` to the sums."""
    return sums[0] + more[0], sums[1] + more[1], sums[2] + more[2]
