"""Anchors with a candidate each, in the same order, and further candidates: no ids, and few rows in one matrix."""

import itertools

import pytest
import test_rowstats
import torch
from gloo_ranks import Pool, ranks  # noqa: F401
from reference import DTYPES, assert_gradients, assert_loss, assert_temperature, masks, normal, row_losses, solve
from torch import Tensor
from triton_runs import launches

import fastcl
from fastcl import FastclError
from fastcl.rowstats import chunked

SHAPES = ((4, 4), (5, 6), (7, 15), (33, 70))


def ids(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n), torch.arange(m)


def sides(n: int, m: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(rows, 20, seed=k).to(dtype).mul(0.1).requires_grad_() for k, rows in enumerate((n, m))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ("ntxent", "dcl"))
def test_against_the_formula(name: str, dtype: torch.dtype, tiled: list[int]) -> None:
    wide = dtype if dtype == torch.float64 else torch.float32
    for (n, m), temperature, normalize in itertools.product(SHAPES, (1 / 59, 0.3), (True, False)):
        x, y = sides(n, m, dtype)
        t, sample = torch.tensor(temperature, dtype=wide, requires_grad=True), ids(n, m)
        of, weights = row_losses(name, masks(sample[0], None, sample[1])), torch.linspace(0.1, 1, n, dtype=wide)
        truths = [solve(of, x, t.item(), y, given, normalize) for given in (None, weights)]
        for names, reduction in itertools.product((None, sample), ("mean", "none")):
            loss = fastcl.contrastive_loss((x, y), names, None, name, t, reduction, normalize)
            truth, loss = (truths[1], (loss * weights).sum()) if reduction == "none" else (truths[0], loss)
            *grads, grad_t = torch.autograd.grad(loss, (x, y, t))
            assert_loss(loss, truth, dtype)
            assert_gradients(grads, truth)
            assert_temperature(grad_t, truth, dtype)
    assert not tiled


@pytest.mark.parametrize("field", test_rowstats.FIELDS)
def test_statistics(field: str, tiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_rowstats, "small_tiles", lambda *_: pytest.MonkeyPatch.context())
    sample, sample_y = ids(9, 22)
    given = {"sample": sample, "sample_y": sample_y}
    test_rowstats.check("chunked", (field,), normal(9, 9), normal(22, 9, seed=1), given, 0.2)
    assert not tiled


def test_the_border_of_the_small_matrix(tiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the number of entries that decides, not that of anchors."""
    monkeypatch.setattr(chunked, "WHOLE", 6 * 20)
    results = []
    for m in (20, 21):
        x, y = normal(6, 5).requires_grad_(), torch.cat([normal(20, 5, seed=1), normal(20, 5, seed=1)[:1]])[:m]
        with fastcl.backend("dense"):
            want = fastcl.contrastive_loss((x, y), None, temperature=0.2)
        for names in (None, ids(6, m)):
            results += [fastcl.contrastive_loss((x, y), names, temperature=0.2), want]
        assert tiled == [6] * 2 * (m > 20)
    torch.testing.assert_close(results[::2], results[1::2], rtol=1e-13, atol=0)


@pytest.mark.parametrize("sample_y", ([0, 1, 2, 3, 2, 5, 6], [0, 1, 2, 3, 5, 5, 6], [0, 2, 1, 3, 4, 5, 6]))
def test_ids_in_another_order_are_seen(sample_y: list[int], tiled: list[int]) -> None:
    """A second view, two candidates of one sample that is no anchor's, candidates in another order."""
    x, y, sample, names = normal(4, 5), normal(7, 5, seed=1), torch.arange(4), torch.tensor(sample_y)
    truth = solve(row_losses("ntxent", masks(sample, None, names)), x, 0.2, y)
    assert_loss(fastcl.contrastive_loss((x, y), (sample, names), temperature=0.2), truth, x.dtype)
    assert tiled == [4]


def test_on_the_other_backends_and_compiled(tiled: list[int]) -> None:
    x, y = (normal(*shape, seed=k).float().requires_grad_() for k, shape in enumerate(((6, 24), (9, 24))))
    sample = ids(6, 9)
    truth = solve(row_losses("ntxent", masks(sample[0], None, sample[1])), x.detach(), 0.2, y.detach())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return fastcl.contrastive_loss((x, y), None, temperature=0.2, precision="fp32")

    for call in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        for backend in ("dense", "chunked"):
            with fastcl.backend(backend):
                assert_gradients(torch.autograd.grad(call(x, y), (x, y)), truth)
    assert tiled == [6]  # compiled
    with launches():
        assert_gradients(torch.autograd.grad(loss(x, y), (x, y)), truth, "fp32")
        square = torch.autograd.grad(loss(x, y[:6]), (x, y))
    want = torch.autograd.grad(fastcl.contrastive_loss((x, y[:6]), None, temperature=0.2), (x, y))
    torch.testing.assert_close(square, want, rtol=1e-4, atol=1e-6)
    with pytest.raises(FastclError, match="chunked .*torch.func.grad"):
        torch.func.grad(loss)(x, y)


def test_what_does_not_fit() -> None:
    x, y = torch.ones(3, 4), torch.ones(2, 4)
    for arguments, message in (
        (((x, y), None), "without sample, z must have a candidate for each anchor, got 3 anchors and 2 candidates"),
        (((x, x[:, :2]), None), r"x and y must have the same width, dtype and device, got \(3, 4\)"),
        (((x, x), None, (x[:, 0].long(),) * 2), "sample must be a pair of tensors or, without labels, None"),
        (((x, x), None, None, "nscl"), "labels are required by objective 'nscl'"),
        ((x, None), "sample is required|sample must be"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.contrastive_loss(*arguments)


def over_ranks(rank: int, with_ids: bool) -> list[Tensor]:
    """This rank's share: 4 anchors and 4 + 3 * rank candidates."""
    x, y = (normal(n, 6, seed=10 * k + rank).requires_grad_() for k, n in enumerate((4, 4 + 3 * rank)))
    sample = tuple(100 * rank + v for v in ids(len(x), len(y))) if with_ids else None
    loss = fastcl.contrastive_loss((x, y), sample, temperature=0.3, gather_distributed=True)
    return [loss.detach(), *torch.autograd.grad(loss, (x, y))]


@pytest.mark.dist
def test_over_ranks(ranks: Pool) -> None:  # noqa: F811
    world = 3
    x, y = ([normal(4 + 3 * r * k, 6, seed=10 * k + r) for r in range(world)] for k in range(2))
    places = torch.cat([torch.arange(len(v)) + 100 * r for r, v in enumerate(y)])
    own = torch.cat([torch.arange(4) + 100 * r for r in range(world)])
    truth = solve(row_losses("ntxent", masks(own, None, places)), torch.cat(x), 0.3, torch.cat(y))
    for with_ids in (False, True):
        shares, *grads = zip(*ranks.run(over_ranks, with_ids), strict=True)
        assert_loss(sum(shares) / world, truth, torch.float64)
        assert_gradients([torch.cat(g) / world for g in grads], truth)
