"""Few rows with any number of views on a CPU, and the memory that few rows keep."""

import math

import pytest
import test_rowstats
import torch
from reference import DTYPES, FORMULAS, normal
from test_objectives import check, uneven_batch
from torch import Tensor

import fastcl
from fastcl.rowstats import chunked

every_objective = pytest.mark.parametrize("name", FORMULAS)


@every_objective
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_views(name: str, dtype: torch.dtype, tiled: list[int]) -> None:
    sample, labels = uneven_batch()
    for temperature in (0.05, 0.5, 10.0):
        check("chunked", name, normal(41, 24).to(dtype), sample, labels, temperature, tile=None)
    check("chunked", name, (normal(41, 24) * 0.3).to(dtype), sample, labels, 0.5, normalize=False, tile=None)
    assert not tiled
    check("chunked", name, normal(41, 3).to(dtype), sample, labels, 0.01, tile=None)
    zero = normal(41, 24).to(dtype).masked_fill_(torch.arange(41)[:, None] == 5, 0)
    check("chunked", name, zero, sample, labels, 0.5, tile=None)
    assert tiled == [41, 41]


@every_objective
def test_an_even_number_of_views_is_not_taken_for_pairs(name: str, tiled: list[int]) -> None:
    sample = torch.arange(8).repeat(4)
    for ids in (sample, sample.sort().values, torch.cat([sample[:16] % 4, sample[:16] + 8])):
        check("chunked", name, normal(32, 24).float(), ids, ids % 3, 0.2, tile=None)
    assert not tiled


@pytest.mark.parametrize("field", test_rowstats.FIELDS)
def test_statistics_of_any_number_of_views(field: str, tiled: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sample, labels = uneven_batch()
    monkeypatch.setattr(test_rowstats, "small_tiles", lambda *_: pytest.MonkeyPatch.context())
    for ids in ({"sample": sample}, {"sample": sample, "labels": labels}):
        for dtype in DTYPES:
            test_rowstats.check("chunked", (field,), normal(41, 9).to(dtype), None, ids, 0.2)
    x = normal(41, 9).float().requires_grad_()
    stats = fastcl.row_stats(x, sample=torch.arange(41) % 21, temperature=0.07)
    (grad,) = torch.autograd.grad(stats.spread_view.sum(), x)
    assert not stats.spread_view.any() and not grad.any() and not tiled


def kept(reduction: str, n: int) -> list[int]:
    """Bytes of the tensors that are kept for the backward pass of n rows."""
    x, sample, sizes = normal(n, 16).float().requires_grad_(), torch.arange(n // 2).repeat(2), {}

    def pack(v: Tensor) -> Tensor:
        sizes[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        fastcl.contrastive_loss(x, sample, sample % 10, "supcon", 0.1, reduction)
    return list(sizes.values())


def test_memory_kept_for_backward(tiled: list[int]) -> None:
    assert sum(kept("mean", 1024)) < 3 * 4 * 1024 * 16
    assert not tiled
    assert 4 * chunked.WHOLE / 4 < sum(kept("none", 1024)) < 3 * 4 * chunked.WHOLE
    side = math.isqrt(chunked.WHOLE)
    assert max(kept("none", side + 2)) < 4 * chunked.WHOLE / 8 and tiled == [side + 2]
