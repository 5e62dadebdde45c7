"""What one rank of a compiled loss refuses: an error of all ranks, at run time."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from gloo_ranks import Pool, ranks  # noqa: F401
from reference import normal
from test_global_batch import compiled
from test_rank_refusals import assert_common
from torch import Tensor

import fastcl
from fastcl.rowstats.registration import KEEPS_ORDER

pytestmark = pytest.mark.dist

SAMPLE = torch.arange(6) // 2
ACROSS: dict[str, Any] = {"gather_distributed": True}
# Functions of rows and of whether this rank is to pass what is refused, and words of the error.
REFUSED: dict[str, tuple[Callable[[Tensor, bool], Tensor], tuple[str, ...]]] = {
    "loss": (lambda z, bad: fastcl.ntxent_loss(z[::2], z[1::2], -bad or 0.5, **ACROSS), ("temperature", "got -1")),
    "no tensor": (lambda z, bad: fastcl.ntxent_loss(z[::2], None if bad else z[1::2], **ACROSS), ("z2", "NoneType")),
    "losses": (
        lambda z, bad: list(
            fastcl.contrastive_losses(z, SAMPLE, SAMPLE, ["dcl", "x" if bad else "nscl"], **ACROSS).values()
        )[1],
        ("unknown objective 'x'",),
    ),
    "each row": (
        lambda z, bad: fastcl.contrastive_loss(z, SAMPLE[bad:], reduction="none", **ACROSS).mean(), ("sample", "(5,)"),
    ),
    "clip": (
        lambda z, bad: fastcl.clip_loss(z[::2], z[1::2], 2.0, label_smoothing=bad / 1, **ACROSS),
        ("label_smoothing", "got 1.0"),
    ),
    "sigmoid": (
        lambda z, bad: fastcl.sigmoid_loss(z[::2], z[1 + bad :: 2], 2.0, -1.0, **ACROSS), ("image and text", "(2, 4)"),
    ),
    "explicit": (
        lambda z, bad: fastcl.explicit_pairs_loss(z, torch.arange(4 - bad).view(2 - bad, -1), **ACROSS),
        ("pairs", "(1, 3)"),
    ),
    "statistics": (
        lambda z, bad: fastcl.row_stats(
            z, z, sample=SAMPLE, sample_y=SAMPLE, temperature=0.5, self_y=torch.arange(6 - bad), **ACROSS
        ).lse_other.sum(),
        ("self_y", "(5,)"),
    ),
    "statistics of both sides": (
        lambda z, bad: sum(
            one.lse_other.sum()
            for one in fastcl.row_stats(
                z, z[bad:], sample=SAMPLE, sample_y=SAMPLE, temperature=0.5, columns=True, **ACROSS
            )
        ),
        ("sample_y", "(6,)"),
    ),
    "two models": (
        lambda z, bad: fastcl.twin_stats(z, z[bad:], SAMPLE, temperature=0.5, **ACROSS).b.lse_other.sum(),
        ("za and zb", "(5, 4)"),
    ),
    "module": (
        lambda z, bad: fastcl.NSCLLoss(**ACROSS)(z[::2], z[1::2], torch.arange(3 + bad)), ("labels", "(4,)"),
    ),
}  # fmt: skip


def refused(rank: int, name: str, engine: str | None, whole: bool, dynamic: bool | None = None) -> list[Any]:
    """What a call returns before rank 1 passes what is refused, the error of that call, and what the next returns."""
    z, function = normal(6, 4).requires_grad_(), REFUSED[name][0]
    if engine is not None:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=whole, backend=engine, dynamic=dynamic)
    found: list[Any] = [function(z, False).detach()]
    for bad in (rank == 1, False):
        try:
            found.append(function(z, bad).detach())
        except fastcl.FastclError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_compiled_rank_alone_refuses_raises_on_all_and_harms_no_later_call(
    ranks: Pool,  # noqa: F811
    name: str,
) -> None:
    ways = (None, True), ("aot_eager", True), ("aot_eager", False), ("aot_eager", True, True)
    for way in ways if name in ("loss", "statistics") else ways[:2]:
        texts = set()
        for before, error, after in ranks.run(refused, name, *way):
            torch.testing.assert_close(after, before, rtol=0, atol=0)
            texts.add(error)
        (text,) = texts
        assert all(word in text for word in ("rank 1 of 3", *REFUSED[name][1])), text


def unused(rank: int) -> list[float]:
    """Compiled code that does not use the loss; rank 1 refuses its own."""

    def step(z: Tensor, t: float) -> Tensor:
        fastcl.ntxent_loss(z[::2], z[1::2], t, gather_distributed=True)
        return z.sum()

    return compiled(step, "aot_eager")(normal(6, 4), 0.0 if rank == 1 else 0.5).tolist()


@pytest.mark.skipif(not KEEPS_ORDER, reason="compilers of this version of PyTorch drop what nobody uses")
def test_a_refusal_is_heard_where_nobody_uses_the_loss(ranks: Pool) -> None:  # noqa: F811
    assert_common(ranks.outcomes(unused), ("rank 1 of 3", "temperature", "0.0"))


def changing(rank: int, values: Sequence[float]) -> list[str]:
    """The errors of a compiled loss at one temperature after the other; a number that changes becomes a symbol."""
    z = normal(6, 4)
    torch._dynamo.reset()
    loss = torch.compile(
        lambda t: fastcl.ntxent_loss(z[::2], z[1::2], t, gather_distributed=True), fullgraph=True, backend="aot_eager"
    )
    texts = []
    for value in values:
        try:
            loss(value if rank else 0.5)
        except fastcl.FastclError as error:
            texts.append(str(error))
    return texts


def test_errors_of_compiled_losses_repeat_numbers_that_change(ranks: Pool) -> None:  # noqa: F811
    for texts in ranks.run(changing, (0.5, -0.25, -0.125, 2e30)):
        assert [text.partition("got ")[2].partition(";")[0] for text in texts] == ["-0.25", "-0.125", "2e+30"]
