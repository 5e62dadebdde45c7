"""The Triton backend's working order: by counting and after a sort, for labels and for arbitrary ids."""

import pytest
import torch
from reference import masks
from test_rowstats import integers
from torch import Tensor
from triton_runs import DEVICE, Launches, few_programs, launches  # noqa: F401

from fastcl.rowstats.order import Layout
from fastcl.rowstats.triton import forward, working_order
from fastcl.rowstats.triton.operand import Call, Source
from fastcl.rowstats.triton.working_order import known_order

pytestmark = pytest.mark.usefixtures("few_programs")


def members(order: Tensor, rows: tuple[int, int]) -> Tensor:
    """(N, N) mask, by source rows: which rows' positions lie in each row's interval."""
    order = order.cpu()
    begin, end = order[rows[0]], order[rows[1]]
    at = torch.arange(order.shape[1])
    inside = (begin[:, None] <= at) & (at < end[:, None])
    found = torch.zeros_like(inside)
    found[order[0].long()[:, None], order[0].long()] = inside
    return found


def apart(ids: Tensor) -> Tensor:
    """The same ids, not one after the other in memory."""
    return torch.stack([ids, -ids], 1)[:, 0]


def written(samples: int, views: int, labels: Tensor | None) -> tuple[Tensor, Launches]:
    """The order that a forward pass works with, and its launches."""
    call = Call(None, 0.5, True, "fp16", (), "none", False)
    rows = [torch.ones(samples, 2, device=DEVICE) for _ in range(2)]
    with launches() as ran:
        order = known_order(samples, views, None if labels is None else apart(labels.to(DEVICE)), DEVICE)
        one = Source(rows[0], rows[1] if views == 2 else None, order)
        other = None if views == 2 else Source(rows[1], None, order)
        operands, *_ = forward.statistics(one, other, call, None, False)
    return operands[0].order.cpu(), ran


@pytest.mark.parametrize("b", (1, 7, 600))
@pytest.mark.parametrize("kind", ("none", "few", "minus one", "extreme"))
def test_the_known_order_of_two_views(kind: str, b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels write, by counting and after a sort of the labels, is what sorting arbitrary ids would give."""
    extremes = torch.tensor([-(2**63), -2, -1, 0, 2**63 - 2, 2**63 - 1])
    labels = {
        "none": None, "few": integers(3, b, b), "minus one": integers(4, b, b) - 1,
        "extreme": extremes[integers(6, b, b)],
    }[kind]  # fmt: skip
    sample, both = torch.arange(b).repeat(2), None if labels is None else labels.repeat(2)
    found, ran = written(b, 2, labels)
    assert not ran.of("layout_kernel")
    monkeypatch.setattr(working_order, "COUNTED", 0)
    by_sort, ran = written(b, 2, labels)
    assert [one.grid for one in ran.of("layout_kernel")] == ([] if labels is None else [(2 if b == 600 else 1,)])
    assert torch.equal(found, by_sort)
    sorted_order, _ = working_order.sorted_orders(Layout.of(sample, both, None, None))
    if kind in ("none", "few"):  # no sample without a class: both sort alike
        assert torch.equal(found, sorted_order.tensor)
    m = masks(sample, both)
    for one in (found, sorted_order.tensor):
        assert torch.equal(one[0].sort().values, torch.arange(2 * b, dtype=torch.int32))
        assert torch.equal(members(one, (3, 4)).fill_diagonal_(False), m.view)
        assert torch.equal(members(one, (1, 2)), ~m.other)


def test_the_known_order_of_two_towers() -> None:
    found, _ = written(5, 1, None)
    assert torch.equal(found, torch.arange(5).int() + torch.tensor([0, 0, 1, 0, 1])[:, None].int())


@pytest.mark.parametrize("labelled", (False, True))
def test_counted_ids_have_the_order_of_sorted_ones(labelled: bool) -> None:
    """Samples and classes of any size, which the other side may lack; rows of either side beyond a program's."""
    extremes = torch.tensor([-(2**63), -2, -1, 0, 5, 2**63 - 1])
    sample, sample_y = extremes[integers(6, 150, 1)], integers(90, 41, 2) - 2
    classes = torch.cat([extremes, integers(4, 90, 3) - 1])
    labels, labels_y = (classes[v.clamp(0, 5) + v.clamp(0, 89)] if labelled else None for v in (sample, sample_y))
    for ids in ((sample, labels, None, None), (sample, labels, sample_y, labels_y)):
        given = [None if v is None else apart(v.to(DEVICE)) for v in ids]
        with launches():
            counted = working_order.orders(*given)
        for one, other in zip(counted, working_order.sorted_orders(Layout.of(*given)), strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or torch.equal(one.tensor, other.tensor)
