"""Losses over ranks while a CUDA graph is captured. No GPU is needed: PyTorch is made to say that it captures."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from gloo_ranks import Pool, own, ranks  # noqa: F401
from reference import normal
from test_ranks import CUTS, collectives
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastcl

pytestmark = pytest.mark.dist
capturing = patch.multiple(torch.cuda, is_initialized=lambda: True, is_current_stream_capturing=lambda: True)


def value_and_gradient(rank: int, temperature: float, more: int = 0) -> list[Tensor]:
    mine = own(rank, CUTS, 20)
    z = normal(20, 128)[mine.start : mine.stop - more].requires_grad_()
    sample = torch.arange(10).repeat_interleave(2)[mine][: len(z)]
    loss = fastcl.contrastive_loss(z, sample, sample % 2, "supcon", temperature, gather_distributed=True)
    return [loss.detach(), *torch.autograd.grad(loss, z)]


def captured(rank: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    eager = value_and_gradient(rank, 0.31)
    value_and_gradient(rank, 0.32)  # another agreement after it
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen, capturing:
        again = value_and_gradient(rank, 0.31)
    return eager, again, collectives(seen.events())


def test_a_captured_call_exchanges_rows_alone(ranks: Pool) -> None:  # noqa: F811
    """Ranks of 6, 2 and 12 rows: a captured call knows the sizes of the other ranks and asks for nothing."""
    for eager, again, sent in ranks.run(captured):
        assert all(map(torch.equal, eager, again))
        assert sorted(sent) == [12, 5 * 12, 128 * 12]  # labels, five numbers a row, rows: no arguments to compare


def not_agreed(rank: int, kind: str) -> Any:
    value_and_gradient(rank, 0.33)
    with capturing:
        return value_and_gradient(rank, *{"temperature": (0.34,), "rows": (0.33, 1), "refused": (-1.0,)}[kind])


@pytest.mark.parametrize(("kind", "words"), [
    ("temperature", "had no such call"), ("rows", "now and had [{}, 0] rows"), ("refused", "temperature must be"),
])  # fmt: skip
def test_what_was_not_agreed_before_is_refused_without_an_exchange(ranks: Pool, kind: str, words: str) -> None:  # noqa: F811
    found = ranks.outcomes(not_agreed, kind)
    for rank, (error, n) in enumerate(zip(found, (6, 2, 12), strict=True)):
        assert "FastclError" in error.trace and words.format(n) in error.text, (rank, error.text)
