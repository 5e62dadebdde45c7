"""The features of the similarity benchmark: several models on the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SECTIONS = ("pair", "stream", "models", "twins")  # tables of the report; two_models.py sets the sizes of "twins"
SHARED, OWN, MEAN = 0.8, 0.6, 0.5  # a model is SHARED times a common part plus OWN times noise, with mean MEAN


@dataclass(frozen=True)
class Case:
    """One measured case.

    Args:
        section: its table in the report.
        n, d, models, dtype: `models` matrices (n, d) of the named dtype.
        chunk: rows that exist at a time; None: all rows exist from the start.
    """

    section: str
    n: int
    d: int
    models: int = 2
    dtype: str = "float32"
    chunk: int | None = None

    @property
    def pairs(self) -> int:
        """Number of pairs of different models."""
        return self.models * (self.models - 1) // 2

    def shrunk(self, n: int) -> Case:
        """The same case on n samples; a stream has a shorter last chunk."""
        return replace(self, n=n, chunk=self.chunk and max(1, 2 * n // 5))

    def __str__(self) -> str:
        models = "" if self.models == 2 else f", {self.models} models"
        chunk = f", in chunks of {self.chunk:,} rows" if self.chunk else ""
        return f"n = {self.n:,}, d = {self.d:,}{models}, {self.dtype}{chunk}"


KEYS = tuple(field.name for field in fields(Case))  # keys of a record that identify its case


class Features:
    """The features of a case, equal for all providers."""

    def __init__(self, case: Case, device: torch.device) -> None:
        """Draw the features, unless they come in chunks."""
        self.case, self.device = case, device
        self._held = None if case.chunk else self._rows(case.n, 0)

    def batches(self) -> Iterator[list[Tensor]]:
        """Per batch, a (b, d) tensor of each model: all rows at once, or chunks drawn on the fly."""
        if self._held:
            yield self._held
            return
        for start in range(0, self.case.n, self.case.chunk):
            yield self._rows(min(self.case.chunk, self.case.n - start), start)

    def whole(self) -> list[Tensor]:
        """(n, d) of each model; concatenates the chunks if they are drawn on the fly."""
        return self._held or [torch.cat(chunks) for chunks in zip(*self.batches(), strict=True)]

    def _rows(self, n: int, seed: int) -> list[Tensor]:
        # In place: a temporary of this size would raise the high-water mark at which a memory measurement starts.
        generator = torch.Generator(self.device).manual_seed(seed)
        made = []
        for _ in range(self.case.models):
            x = torch.empty(n, self.case.d, dtype=getattr(torch, self.case.dtype), device=self.device)
            x.normal_(generator=generator)
            if made:
                x.mul_(OWN).add_(made[0], alpha=SHARED).add_(MEAN * (1 - SHARED))
            else:
                x.add_(MEAN)
            made.append(x)
        return made


# Sizes (n, d) of the section "pair" by device, then the other cases. For each width small sizes come first, to predict
# which larger ones would take too long.
SIZES = {
    "cpu": ((1000, 128), (10_000, 128), (100_000, 128), (1000, 512), (4000, 512), (10_000, 512), (100_000, 512),
            (1000, 2048), (4000, 2048), (1000, 4096)),
    "cuda": tuple((n, d) for d in (128, 512, 2048, 4096) for n in (1000, 10_000, 100_000, 1_000_000)),
}  # fmt: skip
OTHERS = {
    "cpu": (Case("stream", 1_000_000, 128, chunk=20_000),),
    "cuda": (
        Case("stream", 1_000_000, 128, chunk=50_000),
        Case("models", 50_000, 2048, 4, "bfloat16"),
        Case("models", 1_280_000, 2048, 4, "bfloat16", chunk=64_000),
    ),
}
TINY = (
    Case("pair", 60, 8), Case("pair", 24, 40), Case("stream", 100, 8, chunk=30), Case("models", 50, 6, 4, "bfloat16")
)  # fmt: skip
