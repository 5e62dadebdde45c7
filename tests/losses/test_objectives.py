"""Every objective of the table against its paper's formula in float64: values, gradients, invariances, bounds."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    DTYPES,
    FORMULAS,
    Formula,
    Masks,
    assert_gradients,
    assert_loss,
    assert_rows,
    assert_temperature,
    masks,
    mean,
    normal,
    row_losses,
    small_tiles,
    solve,
    sum_exp,
)
from torch import Tensor

import fastcl
from fastcl import FastclError, Objective
from fastcl.losses.objectives import ObjectiveLike
from fastcl.rowstats import chunked

BACKENDS = ("dense", "chunked")
TEMPERATURES = (0.01, 0.05, 0.1, 0.5, 1.0, 10.0)  # the first is below 1/60: beyond the reach of bare exponentials
EXAMPLES = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def check(
    backend: str,
    name: str | Formula,
    z: Tensor,
    sample: Tensor,
    labels: Tensor,
    temperature: float,
    normalize: bool = True,
    tile: tuple[int, int] | None = (8, 12),
    objective: ObjectiveLike | None = None,
) -> list[bool]:
    """One objective against its formula, each row with a weight of its own. Returns the paths of the chunked passes.

    Without a tile few rows take the way that they take outside of tests.
    """
    wide = z.dtype if z.dtype == torch.float64 else torch.float32
    z, t = z.detach().requires_grad_(), torch.tensor(temperature, dtype=wide, requires_grad=True)
    weights = (torch.rand(len(z), generator=torch.Generator().manual_seed(5)) + 0.5).to(wide) / len(z)
    formula = row_losses(name, masks(sample, labels))
    truth = solve(formula, z, t.item(), weights=weights, normalize=normalize, subtracts=name == "supcon")
    with fastcl.backend(backend), nullcontext([]) if tile is None else small_tiles(chunked, *tile) as paths:
        rows = fastcl.contrastive_loss(z, sample, labels, objective or name, t, "none", normalize)
        loss = (rows * weights).sum()
        grads = torch.autograd.grad(loss, (z, t))
    assert rows.dtype == wide and fastcl.last_backend() == backend
    assert_rows(rows, truth, z.dtype)
    assert_loss(loss, truth, z.dtype)
    assert_gradients(grads[:1], truth)
    assert_temperature(grads[1], truth, z.dtype)
    return paths


def uneven_batch() -> tuple[Tensor, Tensor]:
    """41 rows: samples of 1, 2 and 3 views, four classes, two unlabelled samples, shuffled."""
    views = torch.arange(20) % 3 + 1
    views[0] = 3
    sample = torch.arange(20).repeat_interleave(views)
    labels = (torch.arange(20) % 4).masked_fill(torch.arange(20) > 17, -1)[sample]
    order = torch.randperm(len(sample), generator=torch.Generator().manual_seed(3))
    return sample[order], labels[order]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_values_and_gradients_at_all_temperatures(name: str, dtype: torch.dtype, backend: str) -> None:
    sample, labels = uneven_batch()
    for temperature in TEMPERATURES:
        paths = check(backend, name, normal(len(sample), 24).to(dtype), sample, labels, temperature)
        if backend == "chunked":
            assert paths == [temperature >= 1 / 60] * 2  # forward and backward


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_rows_that_are_not_normalised(name: str, dtype: torch.dtype, backend: str) -> None:
    sample, labels = uneven_batch()
    for size, bounded in ((0.3, True), (2.0, False)):  # logits up to 8 and up to 400
        z = (normal(len(sample), 24) * size).to(dtype)
        paths = check(backend, name, z, sample, labels, 0.5, normalize=False)
        assert set(paths) == ({bounded} if backend == "chunked" else set())


@pytest.mark.parametrize("temperature", (0.01, 0.1))
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_the_real_size(backend: str, temperature: float) -> None:
    sample = torch.arange(750).repeat(2)
    labels = (torch.arange(750) % 300).masked_fill(torch.arange(750) % 50 == 0, -1).repeat(2)
    rows, columns = chunked.TILE["cpu"]
    assert 1500 > 2 * rows and 1500 % rows and columns > rows
    name = "nscl" if temperature < 0.05 else "supcon"
    check(backend, name, normal(1500, 32).float(), sample, labels, temperature, tile=(rows, columns))


@st.composite
def batches(draw) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, sample ids and labels of any kind."""
    views = torch.tensor(draw(st.lists(st.integers(1, 4), min_size=1, max_size=8)))
    b, seed = len(views), draw(st.integers(0, 999))
    int64 = st.integers(-(2**63), 2**63 - 1)
    ids = draw(st.one_of(st.just(list(range(b))), st.lists(int64, min_size=b, max_size=b, unique=True)))
    classes = draw(
        st.one_of(
            st.just([7] * b),
            st.just(list(range(b))),
            st.just(ids),  # class ids that are sample ids
            st.lists(st.integers(-2, 2), min_size=b, max_size=b),  # -1: unlabelled; -2: a class like any other
            st.lists(int64, min_size=b, max_size=b),
        )
    )
    which = torch.arange(b).repeat_interleave(views)
    if draw(st.booleans()):
        which = which[torch.randperm(len(which), generator=torch.Generator().manual_seed(seed))]
    n, d = len(which), draw(st.sampled_from((1, 2, 3, 8, 33)))
    dtype = draw(st.sampled_from(DTYPES))
    layouts = (
        lambda: normal(n, d, seed=seed).to(dtype),
        lambda: normal(d, n, seed=seed).to(dtype).T,
        lambda: normal(2 * n, 3 * d, seed=seed).to(dtype)[::2, 1::3],
        lambda: normal(1, d, seed=seed).to(dtype).expand(n, d),
    )
    return draw(st.sampled_from(layouts))(), torch.tensor(ids)[which], torch.tensor(classes)[which]


TILES = st.tuples(st.integers(1, 9), st.integers(1, 15))


@EXAMPLES
@given(batches(), st.sampled_from(list(FORMULAS)), st.sampled_from(TEMPERATURES), st.sampled_from(BACKENDS), TILES)
def test_any_batch(batch, name: str, temperature: float, backend: str, tile: tuple[int, int]) -> None:
    z, sample, labels = batch
    check(backend, name, z, sample, labels, temperature, tile=tile)


def simplex(n: int, copies: int, noise: float) -> Tensor:
    """Each of n points as far from the others as can be, `copies` times, with noise; float32."""
    corners = torch.eye(n, dtype=torch.float64) - 1 / n
    return (corners.repeat(copies, 1) + noise * normal(n * copies, n)).float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", (2, 4))
@pytest.mark.parametrize("temperature", (0.05, 0.1))
@pytest.mark.parametrize("name", FORMULAS)
def test_converged(name: str, temperature: float, copies: int, backend: str) -> None:
    """At a loss within 1e-3 of its minimum the weights p - 1 and p - 1/n are what is left of two nearly equal terms."""
    labels = torch.arange(12).repeat(copies)
    # SupCon: what is in one place is one class, of two samples with two views each where there are four copies.
    sample = torch.arange(6 * copies).repeat(2) if name.startswith("supcon") else labels
    formula = row_losses(name, masks(sample, labels))
    lowest = solve(formula, simplex(12, copies, 0.0).double(), temperature).loss
    for noise in (1e-3, 1e-4):
        z = simplex(12, copies, noise)
        assert 0 < solve(formula, z, temperature).loss - lowest < 1e-3
        check(backend, name, z, sample, labels, temperature)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORMULAS)
def test_invariances(name: str, backend: str) -> None:
    sample, labels = uneven_batch()
    z = normal(len(sample), 24).requires_grad_()

    def rows(z: Tensor, sample: Tensor = sample, labels: Tensor = labels) -> Tensor:
        with fastcl.backend(backend), small_tiles(chunked, 8, 12):
            return fastcl.contrastive_loss(z, sample, labels, name, 0.2, "none")

    expected = rows(z)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(normal(24, 24, seed=2)).Q
    sizes = torch.rand(len(z), 1, generator=torch.Generator().manual_seed(3)).double() * 9 + 0.1
    renamed = torch.where(labels == -1, -1, 3 - 5 * labels)
    by_size = rows(z * sizes)
    by_order = rows(z[order], sample[order], labels[order])[order.argsort()]
    for other in (by_size, by_order, rows(z @ rotation), rows(z, 1000 - 7 * sample), rows(z, labels=renamed)):
        torch.testing.assert_close(other, expected, rtol=1e-11, atol=1e-11)
    loss = expected.sum()
    loss.backward()
    # The loss does not depend on the rows' sizes.
    assert ((z * z.grad).sum(1).abs() <= 1e-12 * z.grad.norm(dim=1) * z.norm(dim=1) + 1e-15).all()
    assert z.grad.norm() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@given(st.integers(2, 9), st.integers(2, 5), st.sampled_from((0.1, 0.5, 2.0)), st.integers(0, 99))
def test_gap_of_cl_and_nscl_is_bounded(backend: str, b: int, classes: int, temperature: float, seed: int) -> None:
    """0 <= CL - NSCL <= log(1 + (n_max - 1) exp(2/T) / (B - n_max)), row by row (arXiv 2506.04411, Theorem 1)."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (b,), generator=g)
    label[:2] = torch.tensor([0, 1])
    z, sample, labels = normal(2 * b, 3, seed=seed), torch.arange(b).repeat(2), label.repeat(2)
    with fastcl.backend(backend), small_tiles(chunked, 4, 3):
        stats = fastcl.row_stats(z, sample=sample, labels=labels, temperature=temperature)
        loss = fastcl.contrastive_losses(z, sample, labels, ("dcl", "nscl"), temperature, "none")
    count = torch.bincount(label).max().item()
    gap = loss["dcl"] - loss["nscl"]
    assert (gap >= -1e-14).all()
    assert (gap <= math.log1p((count - 1) * math.exp(2 / temperature) / (b - count)) + 1e-12).all()
    m = masks(sample, labels)
    u = z / z.norm(dim=1, keepdim=True)
    e = (u @ u.T / temperature).exp()
    p, q = e * (m.peer | m.other), e * m.other
    distance = (p / p.sum(1, keepdim=True) - q / q.sum(1, keepdim=True)).abs().sum(1)
    torch.testing.assert_close(2 * fastcl.same_class_mass(stats), distance, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_values(backend: str) -> None:
    """Equal similarities leave counts alone; distinct classes make NSCL the decoupled loss and SupCon NT-Xent."""
    sample, labels = torch.arange(40).repeat(2), (torch.arange(40) % 5).repeat(2)
    same = torch.ones(80, 3, dtype=torch.float64)
    count = dict(zip(FORMULAS, (79, 78, 64, 65, 79, 79, 64), strict=True))
    z = normal(80, 6)
    with fastcl.backend(backend), small_tiles(chunked, 7, 10):
        for name, rows in count.items():
            loss = fastcl.contrastive_loss(same, sample, labels, name, 0.1)
            assert abs(loss.item() - math.log(rows)) < 1e-13
        apart = fastcl.contrastive_losses(z, sample, sample, FORMULAS, 0.1, "none")
        unlabelled = fastcl.contrastive_losses(z, sample, -torch.ones(80, dtype=torch.long), FORMULAS, 0.1, "none")
        plain = fastcl.contrastive_losses(z, sample, objectives=("ntxent", "dcl"), temperature=0.1, reduction="none")
    for name, rows in count.items():
        for loss in (apart, unlabelled):
            same_as = plain["dcl" if rows in (64, 78) else "ntxent"]
            torch.testing.assert_close(loss[name], same_as, rtol=1e-13, atol=1e-13)


def attract_peers(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Peers against peers and others; views stay out."""
    return sum_exp(s, m.peer | m.other).log() - mean(s, m.peer), m.peer, m.other


def attract_peers_among_all(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Peers against everything, the mean inside the log."""
    share = sum_exp(s, m.peer) / m.peer.sum(1).clamp(min=1) / sum_exp(s, m.view | m.peer | m.other)
    return -share.log(), m.peer, m.view | m.other


def spread_of_views(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Nothing is only repelled, so a view is all that a row needs."""
    return sum_exp(s, m.view).log() - mean(s, m.view), m.view, m.view


def half_of_positives_repel(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Views and peers attract, peers and others repel."""
    positives = m.view | m.peer
    return sum_exp(s, m.peer | m.other).log() - mean(s, positives), positives, m.other


OWN = (
    (attract_peers, Objective(("other", "peer"), ("peer",))),
    (attract_peers_among_all, Objective(("view", "peer", "other"), ("peer",), inside=True)),
    (spread_of_views, Objective(("view",), ("view",))),
    (half_of_positives_repel, Objective(("peer", "other"), ("peer", "view"))),
    (FORMULAS["dcl"], lambda r: torch.where(r.valid, torch.logaddexp(r.lse_peer, r.lse_other) - r.mean_view, 0)),
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("formula", "own"), OWN, ids=lambda v: getattr(v, "__name__", ""))
def test_objectives_of_ones_own(formula: Formula, own: ObjectiveLike, backend: str) -> None:
    sample, labels = uneven_batch()
    keep = (labels == labels.view(-1, 1)).sum(1) > 4  # the plain logaddexp has no gradient where both are -inf
    sample, labels = sample[keep], labels[keep]
    check(backend, formula, normal(len(sample), 24), sample, labels, 0.2, objective=own)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (((), ("view",)), r"denominator .*\(\)"),
        ((("view", "self"), ("view",)), "denominator .*'self'"),
        ((("other", "other"), ("view",)), "denominator .*'other', 'other'"),
        ((("other",), ("other",)), "positives .*'other'"),
        ((("other",), ()), r"positives .*\(\)"),
    ),
)
def test_objectives_that_make_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(FastclError, match=message):
        Objective(*arguments)
