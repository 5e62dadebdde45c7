"""Few anchors on a CPU with one candidate each, in the same order, which take the whole matrix at once."""

import itertools

import pytest
import test_rowstats
import torch
from reference import (
    DTYPES,
    assert_gradients,
    assert_loss,
    assert_temperature,
    masks,
    normal,
    row_losses,
    solve,
)

import fastcl


@pytest.mark.parametrize("name", ("ntxent", "dcl"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_way(name: str, dtype: torch.dtype, tiled: list[int]) -> None:
    """Candidate k is the view of anchor k; the candidates are no anchors."""
    wide = dtype if dtype == torch.float64 else torch.float32
    for temperature, rows, normalize in itertools.product((1 / 59, 0.3), (4, 33), (True, False)):
        x, y = (normal(rows, 20, seed=k).to(dtype).mul(0.1).requires_grad_() for k in (0, 1))
        t, ids = torch.tensor(temperature, dtype=wide, requires_grad=True), 3 * torch.arange(rows) - 7
        of, options = row_losses(name, masks(ids, None, ids)), {"normalize": normalize}
        weights = torch.linspace(0.1, 1, rows, dtype=wide)
        for reduction, given in (("mean", None), ("none", weights)):
            truth = solve(of, x, t.item(), y, given, normalize)
            loss = fastcl.contrastive_loss((x, y), (ids, ids), None, name, t, reduction, **options)
            loss = loss if given is None else (loss * given).sum()
            *grads, grad_t = torch.autograd.grad(loss, (x, y, t))
            assert_loss(loss, truth, dtype)
            assert_gradients(grads, truth)
            assert_temperature(grad_t, truth, dtype)
    assert not tiled
    order = torch.arange(8).flip(0)  # right too, but in tiles
    x, y = normal(8, 5), normal(8, 5, seed=1)
    results = [fastcl.contrastive_loss((x, y), (i, i), None, name) for i in (order, order.flip(0))]
    torch.testing.assert_close(*results, rtol=1e-14, atol=0)
    assert tiled == [8]


@pytest.mark.parametrize("field", test_rowstats.FIELDS)
def test_statistics_one_way(field: str, tiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_rowstats, "small_tiles", lambda *_: pytest.MonkeyPatch.context())
    ids = {"sample": torch.arange(15), "sample_y": torch.arange(15)}
    test_rowstats.check("chunked", (field,), normal(15, 9), normal(15, 9, seed=1), ids, 0.2)
    assert not tiled


@pytest.mark.parametrize("way", ("both ways", "by ids", "in order, and further candidates"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_tower_that_is_frozen(way: str, normalize: bool, reduction: str, tiled: list[int]) -> None:
    """Whatever gets no gradient, the gradients of the rest are the same."""
    ids, candidates = (torch.arange(7),) * 2, 7
    if way.startswith("in order"):
        ids, candidates = None, 12

    def gradients(trained: str) -> dict[str, torch.Tensor]:
        given = {
            "x": normal(7, 5),
            "y": normal(candidates, 5, seed=1),
            "t": torch.tensor(0.3, dtype=torch.float64),
        }
        leaves = [given[name].requires_grad_() for name in trained]
        x, y, t = given.values()
        if way == "both ways":
            loss = fastcl.clip_loss(x, y, 1 / t, normalize, reduction=reduction)
        else:
            loss = fastcl.contrastive_loss((x, y), ids, None, "ntxent", t, reduction, normalize)
        weights = torch.linspace(0.5, 1, loss.numel(), dtype=torch.float64).view(loss.shape)
        return dict(zip(trained, torch.autograd.grad((loss * weights).sum(), leaves), strict=True))

    want = gradients("xyt")
    for trained in ("x", "y", "t", "xt", "yt", "xy"):
        for name, got in gradients(trained).items():
            torch.testing.assert_close(got, want[name], rtol=1e-13, atol=1e-15)
    assert not tiled
