"""The pair statistics by other packages, each imported when it is called.

The functions take the features of two models (n, d) and return a number for each of `plain.MEASURES` that the package
offers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class _Loader:
    """What torch-cka needs of a DataLoader: one batch with all samples, each given by its row number."""

    def __init__(self, n: int) -> None:
        self.dataset = "rows"
        self.batch = (torch.arange(n),)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[Tensor]]:
        return iter([self.batch])


class _Rows(nn.Module):
    """A model that returns fixed rows, since torch-cka measures layers of models."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, index: Tensor) -> Tensor:
        return self.x


def torch_cka(x: Tensor, y: Tensor) -> dict[str, float]:
    """torch-cka's debiased CKA in float32, with all rows in one batch, since its average over batches differs."""
    from torch_cka import CKA

    models = [nn.Sequential(_Rows(rows.float())) for rows in (x, y)]
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():  # hides its progress bar
        cka = CKA(*models, "x", "y", ["0"], ["0"], device=str(x.device))
        cka.compare(_Loader(len(x)), _Loader(len(x)))
    return {"debiased CKA": float(cka.export()["CKA"][0, 0])}


def ckatorch(unbiased: bool, x: Tensor, y: Tensor) -> dict[str, float]:
    """ckatorch's CKA or debiased CKA, in float64."""
    from ckatorch import cka_base

    return {"debiased CKA" if unbiased else "CKA": float(cka_base(x, y, unbiased=unbiased))}


def rsatoolbox(x: Tensor, y: Tensor) -> dict[str, float]:
    """rsatoolbox's RSA: Pearson correlation of correlation distances, in float64; it has no cosine distance."""
    from rsatoolbox.data import Dataset
    from rsatoolbox.rdm import calc_rdm, compare

    rdms = [calc_rdm(Dataset(rows.double().numpy()), method="correlation") for rows in (x, y)]
    return {"correlation RSA": float(compare(*rdms, method="corr")[0, 0])}
