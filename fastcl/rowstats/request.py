"""The checked rows and ids of a call, from which every backend of the row statistics starts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcl.checks import check_all_ids, check_ids, check_rows, describe, flat_labels, is_stacked
from fastcl.errors import FastclError, type_of


class Batch(NamedTuple):
    """Anchors, candidates and their ids; build it with `of`, or after their checks with `two_views` or `pairs`.

    If the ids follow from the call, `sample` is None: they are not written out and need not be sorted.
    """

    x: Tensor
    x2: Tensor | None = None  # rows k of x and x2 are the views of sample k; labels are then (B,), one per sample
    y: Tensor | None = None  # candidates; without `sample`, rows k of x and y are pair k, further ones nobody's
    sample: Tensor | None = None
    labels: Tensor | None = None
    sample_y: Tensor | None = None
    labels_y: Tensor | None = None
    stacked: bool = False  # `sample` is known to describe two views in the order of `two_views`

    @classmethod
    def of(
        cls, x: Tensor, y: Tensor | None, sample: Tensor, labels: Tensor | None,
        sample_y: Tensor | None, labels_y: Tensor | None,
    ) -> Batch:  # fmt: skip
        """Rows with arbitrary ids; arguments and errors as `fastcl.row_stats`."""
        check_rows(x, "x")
        if y is not None:
            _check_alike(x, y)
        ids = check_all_ids(x, y, sample, labels, sample_y, labels_y)
        return cls(x, None, y, *ids, y is None and is_stacked(sample, None))

    @classmethod
    def rows(cls, z: Tensor, sample: Tensor, labels: Tensor | None = None) -> Batch:
        """Rows that are candidates too, with arbitrary ids."""
        return cls.of(z, None, sample, labels, None, None)

    @classmethod
    def rectangle(
        cls, x: Tensor, y: Tensor, sample: Tensor, sample_y: Tensor, labels: Tensor | None = None,
        labels_y: Tensor | None = None,
    ) -> Batch:  # fmt: skip
        """Anchors x and candidates y, with arbitrary ids."""
        return cls.of(x, y, sample, labels, sample_y, labels_y)

    @classmethod
    def two_views(cls, z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> Batch:
        """The 2B rows [z1; z2] of B samples, with (B,) or (B, 1) labels."""
        return cls(z1, z2, labels=None if labels is None else flat_labels(labels).long())

    @classmethod
    def pairs(cls, x: Tensor, y: Tensor) -> Batch:
        """Two towers: rows k of both are pair k; y may have further rows, which are others to all."""
        return cls(x, y=y)

    def spelled_out(self) -> Batch:
        """The same batch with all rows in one tensor and an id for each."""
        if self.sample is not None:
            return self
        candidates = self.x if self.y is None else self.y
        sample_y = torch.arange(len(candidates), dtype=torch.int64, device=self.x.device)
        sample = sample_y[: len(self.x)]
        if self.x2 is None:
            return Batch(self.x, y=self.y, sample=sample, sample_y=sample_y)
        labels = None if self.labels is None else self.labels.repeat(2)
        return Batch(torch.cat([self.x, self.x2]), sample=sample.repeat(2), labels=labels)

    def transposed(self) -> Batch:
        """Swap anchors and candidates."""
        assert self.y is not None
        return Batch(self.y, None, self.x, self.sample_y, self.labels_y, self.sample, self.labels)


def check_rectangle(*tensors: object) -> None:
    """Raise FastclError unless they are four or six tensors: x, y, sample, sample_y and perhaps labels, labels_y."""
    names = ("z", "z", "sample", "sample", "labels", "labels")
    for k, (tensor, name) in enumerate(zip(tensors, names, strict=False)):
        if len(tensors) not in (4, 6) or not isinstance(tensor, Tensor):
            unless = " or, without labels, None" if name == "sample" else ""
            raise FastclError(
                f"{name} must be a pair of tensors{unless}, for anchors and for candidates, because z is a tuple; got "
                f"{type_of(tensor)} for the {('anchors', 'candidates')[k % 2]}"
            )


def check_in_order(x: Tensor, y: Tensor) -> None:
    """Raise FastclError unless they are anchors and at least as many candidates, of one width, dtype and device."""
    check_rows(x, "x")
    _check_alike(x, y)
    if len(y) < len(x):
        raise FastclError(
            f"without sample, z must have a candidate for each anchor, got {len(x)} anchors and {len(y)} candidates"
        )


def _check_alike(x: Tensor, y: Tensor) -> None:
    check_rows(y, "y")
    if (y.shape[1], y.dtype, y.device) != (x.shape[1], x.dtype, x.device):
        raise FastclError(f"x and y must have the same width, dtype and device, got {describe(x)} and {describe(y)}")


def check_two_views(z1: Tensor, z2: Tensor, labels: Tensor | None = None) -> None:
    """Raise FastclError unless `Batch.two_views` may be built."""
    check_pairs(z1, z2, ("z1", "z2"))
    if labels is not None:
        check_ids(flat_labels(labels), z1, "labels")


def check_pairs(a: Tensor, b: Tensor, names: tuple[str, str] = ("image", "text")) -> None:
    """Raise FastclError unless both hold the same number of rows, of one width, dtype and device."""
    for x, name in zip((a, b), names, strict=True):
        check_rows(x, name)
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        raise FastclError(
            f"{names[0]} and {names[1]} must have the same shape, dtype and device, got {describe(a)} and {describe(b)}"
        )
