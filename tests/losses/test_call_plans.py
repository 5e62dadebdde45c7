"""Calls that are alike share a plan; whatever differs between two calls is never taken from the other's."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from reference import normal
from torch import Tensor

import fastcl
from fastcl import FastclError, last_backend
from fastcl.losses import call_plans
from fastcl.rowstats.small import whole

LABELS = torch.arange(6) % 3


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """The plans that are kept; none at first."""
    kept: dict = {}
    monkeypatch.setattr(call_plans, "_plans", kept)
    yield kept


def views(rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    z1, z2 = (normal(rows, 5, seed=k).to(dtype).requires_grad_() for k in (0, 1))
    return z1, z2


def test_calls_that_differ_in_values_alone_are_checked_once(plans, monkeypatch):
    checked = []
    made = call_plans._made
    monkeypatch.setattr(call_plans, "_made", lambda *a: checked.append(a[2]) or made(*a))
    z1, z2 = views()
    for temperature in (0.5, 0.2, 1):
        for factor in (1, 2):
            fastcl.ntxent_loss(z1 * factor, z2, temperature)
            fastcl.supcon_loss(z1, z2 * factor, LABELS * factor, temperature)
            fastcl.clip_loss(z1, z2 * factor, temperature)
            fastcl.contrastive_loss(z1, LABELS * factor, temperature=temperature)
    assert len(checked) == len(plans) == 4


CHANGES = {
    "temperature": {"temperature": 0.3},
    "temperature as a tensor": {"temperature": torch.tensor(0.3)},
    "reduction": {"reduction": "sum"},
    "rows of their own": {"reduction": "none"},
    "normalize": {"normalize": False},
    "rows": {"z": views(5), "labels": LABELS[:5]},
    "dtype": {"z": views(dtype=torch.float64)},
    "half": {"z": views(dtype=torch.bfloat16)},
    "frozen": {"z": tuple(v.detach() for v in views())},
    "half frozen": {"z": (views()[0].detach(), views()[1])},
    "parameters": {"z": tuple(map(torch.nn.Parameter, views()))},
    "labels": {"labels": LABELS.int()},
    "one class": {"labels": LABELS * 0},
}


def outcome(backend: str = "auto", **changes) -> list:
    options = {"z": views(), "labels": LABELS, "temperature": 0.5} | changes
    (z1, z2), labels = options.pop("z"), options.pop("labels")
    with fastcl.backend(backend):
        loss = fastcl.supcon_loss(z1, z2, labels, **options)
    leaves = [v for v in (z1, z2) if v.requires_grad]
    grads = torch.autograd.grad(loss.sum(), leaves) if leaves else ()
    return [loss.requires_grad, last_backend(), loss.dtype, loss.tolist(), *(g.tolist() for g in grads)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_argument_has_the_result_of_a_fresh_plan(change, plans):
    for backend in ("auto", "dense"):
        for other in ({}, CHANGES[change]):
            plans.clear()
            fresh = outcome(backend, **other)
            for before in ("auto", "dense"):
                plans.clear()
                outcome(before, **({} if other else CHANGES[change]))
                assert outcome(backend, **other) == fresh


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": True}, "temperature"),  # equals 1.0, and has its hash
        ({"temperature": torch.tensor(-1.0)}, "temperature"),
        ({"temperature": torch.ones(2)}, "temperature"),
        ({"temperature": [1.0]}, "temperature"),
        ({"reduction": ["mean"]}, "reduction"),
        ({"z": (views()[0], views(5)[1])}, "same shape"),
        ({"z": (views()[0], views(dtype=torch.float64)[1])}, "dtype"),
        ({"z": (views()[0], views()[1].detach().numpy())}, "z2 must be a tensor"),
        ({"z": (views()[0], views()[1].to_sparse())}, "dense tensor"),
        ({"z": tuple(v.to("meta") for v in views())}, "meta"),
        ({"labels": None}, "labels are required"),
        ({"labels": LABELS.float()}, "labels must be an integer tensor"),
        ({"labels": LABELS[:5]}, "labels must have one id per row"),
    ],
)
def test_wrong_arguments_are_refused_after_right_ones(wrong, named, plans):
    outcome(temperature=1.0)
    for _ in range(2):
        with pytest.raises(FastclError, match=named):
            outcome(**wrong)
    assert len(plans) <= 2  # a temperature's value is checked at each call


def test_what_a_block_decides_is_read_at_every_call(plans):
    fresh = outcome()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert outcome() == fresh
    with torch.no_grad():
        assert not fastcl.supcon_loss(*views(), LABELS, 0.5).requires_grad
    with pytest.raises(FastclError, match="torch.func.grad"):
        torch.func.grad(lambda z: fastcl.supcon_loss(z, z, LABELS, 0.5))(views()[0])
    assert outcome() == fresh


def test_no_gradient_is_computed_that_nobody_can_ask_for(monkeypatch):
    monkeypatch.setattr(whole, "backward", lambda *_: pytest.fail("computed a gradient"))
    with torch.no_grad():
        fastcl.ntxent_loss(*views())
    fastcl.ntxent_loss(*(v.detach() for v in views()))


def test_plans_are_few_and_keep_nothing_alive(plans, monkeypatch):
    monkeypatch.setattr(call_plans, "MOST", 4)
    for rows in range(3, 20):
        fastcl.ntxent_loss(*views(rows))
        assert 1 <= len(plans) <= 4
    z1, z2 = views()
    weights = torch.ones(6)
    fastcl.supcon_loss(z1, z2, LABELS, torch.tensor(0.5))
    fastcl.contrastive_loss(z1, LABELS, objective=lambda stats, w=weights: w * stats.lse_other)
    kept = [weakref.ref(v) for v in (z1, z2, weights)]
    del z1, z2, weights
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_threads_share_plans(monkeypatch):
    monkeypatch.setattr(call_plans, "MOST", 2)
    wanted = {rows: fastcl.ntxent_loss(*views(rows)).item() for rows in range(3, 9)}
    wrong = []

    def run() -> None:
        for _ in range(30):
            wrong.extend(rows for rows, value in wanted.items() if fastcl.ntxent_loss(*views(rows)).item() != value)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
