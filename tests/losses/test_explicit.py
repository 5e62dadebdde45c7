"""Positives given as pairs, negatives of one anchor alone, unions of statistics, margins and label smoothing."""

import pytest
import torch
from reference import TOLERANCE, normal, unit_rows
from torch import Tensor
from torch.nn.functional import cross_entropy

import fastcl
from fastcl import FastclError, RowStats

BACKENDS = ("dense", "chunked")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
PAIRS = torch.tensor([(0, 1), (1, 0), (0, 4), (6, 2), (6, 2), (3, 5)])
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.0, 2.0, 0.0], dtype=torch.float64)  # row 3 has no positive that counts


def supcon_of_pairs(z: Tensor, pairs: Tensor, weights: Tensor, temperature: float | Tensor, normalize: bool) -> Tensor:
    """(N,) losses pair by pair, as the formula is written."""
    u = unit_rows(z) if normalize else z
    s = u @ u.T / temperature
    losses = []
    for i in range(len(z)):
        mine = pairs[:, 0] == i
        lse = torch.cat([s[i, :i], s[i, i + 1 :]]).exp().sum().log()
        terms = weights[mine] * (lse - s[i, pairs[mine, 1]])
        losses.append(terms.sum() / weights[mine].sum() if weights[mine].sum() > 0 else terms.sum())
    return torch.stack(losses)


@both_backends
@pytest.mark.parametrize("normalize", (True, False))
def test_explicit_pairs(normalize: bool, backend: str) -> None:
    z = normal(7, 5).double().requires_grad_()
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for weights in (None, WEIGHTS):
        given = torch.ones(len(PAIRS), dtype=torch.float64) if weights is None else weights
        want = supcon_of_pairs(z, PAIRS, given, t, normalize)
        with fastcl.backend(backend):
            rows = fastcl.explicit_pairs_loss(z, PAIRS, weights, t, "none", normalize)
            torch.testing.assert_close(rows, want, rtol=1e-12, atol=1e-12)
            for reduction in ("mean", "sum"):
                loss = fastcl.explicit_pairs_loss(z, PAIRS, weights, t, reduction, normalize)
                expected = torch.autograd.grad(getattr(want, reduction)(), (z, t), retain_graph=True)
                torch.testing.assert_close(torch.autograd.grad(loss, (z, t)), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", (1e-300, 1e308))
def test_weights_of_any_size(size: float) -> None:
    """Only the ratios of an anchor's weights count, though their sums leave float32's range, and even float64's."""
    z, weights = normal(7, 5).float(), torch.tensor([size, 1.0, 3e37, 1e-40, 3e38, 1e-44], dtype=torch.float64)
    weights[2] = size / 2
    ratios = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    got, want = (fastcl.explicit_pairs_loss(z, PAIRS, w, 0.3, "none") for w in (weights, ratios))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_pairs_of_equal_labels_are_supcon() -> None:
    z, labels = normal(12, 5), torch.arange(12) % 4
    pairs = (labels[:, None] == labels).fill_diagonal_(False).nonzero()
    loss = fastcl.explicit_pairs_loss(z, pairs, temperature=0.2)
    want = fastcl.contrastive_loss(z, torch.arange(12), labels, "supcon", 0.2)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert fastcl.explicit_pairs_loss(z, pairs[:0]) == 0


@pytest.mark.parametrize(
    "pairs, weights, message",
    [
        (torch.tensor([[0, 1, 2]]), None, r"pairs must be a \(P, 2\) tensor of integers, got .*1, 3"),
        (torch.tensor([[0.0, 1.0]]), None, r"pairs must be a \(P, 2\) tensor"),
        (torch.tensor([[False, True]]), None, r"pairs must be a \(P, 2\) tensor of integers, got .*bool"),
        (torch.tensor([[0j, 1]]), None, r"pairs must be a \(P, 2\) tensor of integers, got .*complex"),
        ([(0, 1)], None, "pairs must be .* list"),
        (torch.tensor([[0, 7]]), None, "pairs must name rows 0 to 6, got 7"),
        (torch.tensor([[-1, 2]]), None, "pairs must name rows 0 to 6, got -1"),
        (torch.tensor([[0, 1], [3, 3]]), None, "itself, got row 3"),
        (PAIRS, torch.ones(5), "weights must be one real number for each of 6 pairs"),
        (PAIRS, WEIGHTS + 0j, "weights must be one real number .*complex128"),
        (PAIRS, -torch.ones(6), "weights must be finite and not negative, got -1"),
        (PAIRS, torch.full((6,), torch.inf), "weights must be finite and not negative, got inf"),
        (PAIRS, torch.full((6,), torch.nan), "weights must be finite and not negative, got nan"),
    ],
)
def test_pairs_that_cannot_be_used(pairs, weights, message: str) -> None:
    with pytest.raises(FastclError, match=message):
        fastcl.explicit_pairs_loss(normal(7, 5), pairs, weights)


def fields(stats: RowStats) -> dict[str, Tensor]:
    return {name: getattr(stats, name) for name in RowStats.__dataclass_fields__}


@both_backends
def test_a_union_is_the_statistics_against_all_candidates(backend: str) -> None:
    x, y = normal(9, 6).requires_grad_(), normal(20, 6, seed=1).requires_grad_()
    sample, sample_y = torch.arange(9) % 5, torch.arange(20) % 6
    labels, labels_y = sample % 3, sample_y % 3
    labels[sample == 4] = labels_y[sample_y > 3] = -1
    weights = normal(9, 1, seed=2)[:, 0]
    # Sample 4 has no view among the first four candidates, classes 1 and 2 no peer in the first.
    for cut in (1, 4, 13):
        parts = (slice(None, cut), slice(cut, None))
        with fastcl.backend(backend):
            whole = fastcl.row_stats(
                x, y, sample=sample, labels=labels, sample_y=sample_y, labels_y=labels_y, temperature=0.3
            )
            a, b = (
                fastcl.row_stats(
                    x, y[p], sample=sample, labels=labels, sample_y=sample_y[p], labels_y=labels_y[p], temperature=0.3
                )
                for p in parts
            )
        for joined in (a.union(b), b.union(a)):
            for name, want in fields(whole).items():
                got = getattr(joined, name)
                torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
                if name.startswith("n_"):
                    continue
                losses = [(v.masked_fill(v == -torch.inf, 0) * weights).sum() for v in (got, want)]
                if name == "lse_peer":  # -inf in both for some rows
                    part = torch.autograd.grad(losses[0], (a.lse_peer, b.lse_peer), retain_graph=True)
                    assert all(grad.isfinite().all() for grad in part)
                grads = [torch.autograd.grad(loss, (x, y), retain_graph=True) for loss in losses]
                torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_a_union_of_close_views_cancels_nothing() -> None:
    x = normal(3, 6)
    y = x + 1e-7 * normal(3, 6, seed=1)
    ids = torch.arange(3)
    parts = [fastcl.row_stats(x, v, sample=ids, sample_y=ids, temperature=0.1) for v in (x, y)]
    whole = fastcl.row_stats(x, torch.cat([x, y]), sample=ids, sample_y=ids.repeat(2), temperature=0.1)
    torch.testing.assert_close(parts[0].union(parts[1]).spread_view, whole.spread_view, rtol=1e-14, atol=0)
    with pytest.raises(FastclError, match="anchors must be the same, got 3 and 4"):
        parts[0].union(fastcl.row_stats(normal(4, 6), x, sample=torch.arange(4), sample_y=ids, temperature=1.0))
    with pytest.raises(FastclError, match="other must be RowStats, got NoneType"):
        parts[0].union(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=str)
def test_paired_negatives(dtype: torch.dtype, normalize: bool) -> None:
    x, y, hard = (v.to(dtype).requires_grad_() for v in (normal(6, 5), normal(6, 5, seed=1), normal(24, 5, seed=2)))
    negatives, ids = hard.view(6, 4, 5), torch.arange(6)
    u, v, w = (unit_rows(r.detach().double()) if normalize else r.detach().double() for r in (x, y, hard))
    s = torch.cat([u @ v.T, (u[:, None] * w.view(6, 4, 5)).sum(2)], 1) / 0.3
    want = cross_entropy(s, ids)
    stats = fastcl.row_stats(x, y, sample=ids, sample_y=ids, temperature=0.3, normalize=normalize)
    joined = stats.union(fastcl.paired_negatives(x, negatives, 0.3, normalize))
    loss = fastcl.OBJECTIVES["ntxent"](joined).mean()
    assert (joined.n_other == 9).all() and joined.valid.all()
    torch.testing.assert_close(loss.double(), want, rtol=TOLERANCE[dtype].loss, atol=0)
    assert all(g.abs().sum() > 0 and g.dtype == dtype for g in torch.autograd.grad(loss, (x, y, hard)))


def test_autocast_changes_nothing() -> None:
    x, y, hard = normal(8, 5).float(), normal(8, 5, seed=1).float(), normal(32, 5, seed=2).float().view(8, 4, 5)

    def values() -> list[Tensor]:
        return [
            fastcl.explicit_pairs_loss(x, PAIRS, temperature=0.3),
            fastcl.paired_negatives(x, hard, 0.3).lse_other,
            fastcl.clip_loss(x, y, 5.0, label_smoothing=0.3),
        ]

    want = values()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = values()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_paired_negatives_that_cannot_be_used() -> None:
    x = normal(6, 5)
    for negatives, message in (
        (normal(6, 5), r"non-empty \(rows, negatives, width\)"),
        (normal(24, 5).view(6, 4, 5)[:, :0], r"non-empty \(rows, negatives, width\)"),
        (normal(24, 5).view(6, 4, 5).float(), "x's rows, width, dtype and device"),
        (normal(24, 5).view(8, 3, 5), "x's rows, width, dtype and device"),
        (None, "non-empty .* None"),
    ):
        with pytest.raises(FastclError, match=message):
            fastcl.paired_negatives(x, negatives)


@pytest.mark.parametrize("name", ("ntxent", "dcl", "supcon", "supcon_in", "supcon_negatives"))
def test_a_margin_lowers_the_logits_of_positives(name: str) -> None:
    z, sample = normal(16, 5).requires_grad_(), torch.arange(8).repeat(2)
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 3, -1]).repeat(2)
    margin = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    u = unit_rows(z)
    view = (sample[:, None] == sample).fill_diagonal_(False)
    peer = (labels[:, None] == labels) & (labels[:, None] != -1) & (sample[:, None] != sample)
    positives = view | peer if name.startswith("supcon") else view
    s = u @ u.T / 0.4 - margin * positives
    kept = {"dcl": ~view, "supcon_negatives": ~(view | peer)}.get(name, torch.ones_like(view))
    lse = s.masked_fill(~kept.clone().fill_diagonal_(False), -torch.inf).logsumexp(1)
    count = positives.sum(1)
    mean = (s * positives).sum(1) / count
    inside = s.masked_fill(~positives, -torch.inf).logsumexp(1) - count.double().log()
    want = (lse - (inside if name == "supcon_in" else mean)).mean()
    loss = fastcl.contrastive_loss(z, sample, labels, fastcl.with_margin(name, margin), 0.4)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(v, (z, margin), retain_graph=True) for v in (loss, want)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    same = fastcl.contrastive_loss(z, sample, labels, fastcl.with_margin(name, 0), 0.4)
    torch.testing.assert_close(same, fastcl.contrastive_loss(z, sample, labels, name, 0.4), rtol=1e-12, atol=0)


def test_margins_that_cannot_be_used() -> None:
    with pytest.raises(FastclError, match="margin must be a number .* nan"):
        fastcl.with_margin("ntxent", float("nan"))
    with pytest.raises(FastclError, match="whose positives are known"):
        fastcl.with_margin(lambda s: s.lse_other, 0.1)


@both_backends
@pytest.mark.parametrize("normalize", (True, False))
def test_label_smoothing_is_that_of_cross_entropy(normalize: bool, backend: str) -> None:
    image, text = normal(7, 5).requires_grad_(), normal(7, 5, seed=1).requires_grad_()
    scale, target = torch.tensor(2.5, dtype=torch.float64, requires_grad=True), torch.arange(7)
    s = scale * (unit_rows(image) @ unit_rows(text).T if normalize else image @ text.T)
    for reduction in ("mean", "sum", "none"):
        options = {"label_smoothing": 0.2, "reduction": reduction}
        want = (cross_entropy(s, target, **options) + cross_entropy(s.T, target, **options)) / 2
        with fastcl.backend(backend):
            loss = fastcl.clip_loss(image, text, scale, normalize, **options)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(v.sum(), (image, text, scale), retain_graph=True) for v in (loss, want)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-13)
    module = fastcl.CLIPLoss(normalize, label_smoothing=0.2)
    assert torch.equal(module(image, text, scale), fastcl.clip_loss(image, text, scale, normalize, label_smoothing=0.2))
    assert fastcl.clip_loss(image[:1], text[:1], scale, label_smoothing=0.2).abs() < 1e-15


def test_label_smoothing_out_of_range() -> None:
    rows = normal(4, 5)
    for value in (-0.1, 1.0, float("nan"), True, "0.1", None, torch.tensor(0.1)):
        with pytest.raises(FastclError, match=r"label_smoothing must be a number in \[0, 1\), got"):
            fastcl.clip_loss(rows, rows, 1.0, label_smoothing=value)
