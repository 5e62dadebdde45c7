"""The losses as users call them: two views, CLIP, modules, reductions, autocast, backends, and every bad input."""

import math
import re

import pytest
import torch
from reference import (
    DTYPES,
    FORMULAS,
    assert_gradients,
    assert_loss,
    assert_rows,
    assert_temperature,
    clip_formula,
    masks,
    normal,
    row_losses,
    small_tiles,
    solve,
)
from torch import Tensor, nn

import fastcl
from fastcl import FastclError
from fastcl.rowstats import chunked

BACKENDS = ("dense", "chunked")
both_backends = pytest.mark.parametrize("backend", BACKENDS)
LABELS = torch.tensor([0, 1, 2, 0, 1, -1, 3])


# Name in the table, function, module, whether it takes labels, temperature by default.
TWO_VIEWS = (
    ("ntxent", fastcl.ntxent_loss, fastcl.NTXentLoss, {}, False, 0.5),
    ("dcl", fastcl.dcl_loss, fastcl.DCLLoss, {}, False, 0.5),
    ("nscl", fastcl.nscl_loss, fastcl.NSCLLoss, {}, True, 0.5),
    ("nscl_with_positive", fastcl.nscl_loss, fastcl.NSCLLoss, {"positive_in_denominator": True}, True, 0.5),
    ("supcon", fastcl.supcon_loss, fastcl.SupConLoss, {}, True, 0.1),
)
two_views = pytest.mark.parametrize(("name", "function", "module", "options", "labelled", "default"), TWO_VIEWS)


@both_backends
@two_views
def test_two_views(name, function, module, options, labelled, default, backend: str) -> None:
    z1, z2 = normal(7, 5).float().requires_grad_(), normal(7, 5, seed=1).float().requires_grad_()
    extra = (LABELS,) if labelled else ()
    both, sample = torch.cat([z1, z2]).detach(), torch.arange(7).repeat(2)
    formula = row_losses(name, masks(sample, LABELS.repeat(2)))
    with fastcl.backend(backend), small_tiles(chunked, 5, 7):
        for temperature, given in ((default, {}), (0.2, {"temperature": 0.2})):
            truth = solve(formula, both, temperature)
            loss = function(z1, z2, *extra, **options, **given)
            assert loss.shape == ()
            assert_loss(loss, truth, z1.dtype)
            assert_gradients([torch.cat(torch.autograd.grad(loss, (z1, z2)))], truth)
            assert torch.equal(module(**options, **given)(z1, z2, *extra), loss)
        rows = function(z1, z2, *extra, 0.2, **options, reduction="none")
        assert_rows(rows, truth, z1.dtype)
        swapped = function(z2, z1, *extra, 0.2, **options, reduction="none")
        torch.testing.assert_close(swapped.roll(7), rows, rtol=1e-6, atol=1e-6)
        raw = solve(formula, both * 0.5, 0.5, normalize=False)
        for f in (function, lambda *a, **k: module(**k)(*a)):
            assert_loss(f(z1 * 0.5, z2 * 0.5, *extra, **options, temperature=0.5, normalize=False), raw, z1.dtype)
            total = f(z1, z2, *extra, **options, temperature=0.2, reduction="sum")
            assert math.isclose(total.item(), 14 * loss.item(), rel_tol=1e-6)
            assert f(z1, z2, *extra, **options, temperature=0.2, reduction="none").shape == (14,)


@both_backends
def test_what_the_papers_code_computes(backend: str) -> None:
    """mean over rows of -s_ip + log(c exp(s_ip) + sum over negatives of exp(s_ij)): its "DCL" is NT-Xent."""
    z1, z2 = normal(24, 6), normal(24, 6, seed=1)
    u = nn.functional.normalize(torch.cat([z1, z2]))
    s = u @ u.T / 0.3
    label = torch.arange(24) % 5
    same_class = label.repeat(2)[:, None] == label.repeat(2)
    partner = (torch.arange(48) + 24) % 48
    positive = s[torch.arange(48), partner]
    not_own = ~torch.eye(48, dtype=torch.bool)
    not_own[torch.arange(48), partner] = False

    def code(c: int, negatives: Tensor) -> Tensor:
        return (-positive + (c * positive.exp() + (s.exp() * negatives).sum(1)).log()).mean()

    with fastcl.backend(backend):
        pairs = (
            (fastcl.ntxent_loss(z1, z2, 0.3), code(1, not_own)),
            (fastcl.dcl_loss(z1, z2, 0.3), code(0, not_own)),
            (fastcl.nscl_loss(z1, z2, label, 0.3, positive_in_denominator=True), code(1, ~same_class)),
            (fastcl.nscl_loss(z1, z2, label, 0.3), code(0, ~same_class)),
        )
        stats = fastcl.two_view_stats(z1, z2, None, 0.3)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    # The paper's sum over pairs of views (l1, l2) counts l1 = l2 too, whose similarity is 1.
    views, paper = u.view(2, 24, 6), 0.0
    for a in views:
        for b in views:
            others = torch.stack([(a @ c.T / 0.3).exp() * ~torch.eye(24, dtype=torch.bool) for c in views]).sum((0, 2))
            paper += ((a * b).sum(1) / 0.3 - others.log()).sum() / (4 * 24)
    torch.testing.assert_close(stats.lse_other.mean() - stats.mean_view.mean() / 2 - 1 / 0.6, -paper)


@both_backends
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", (0.5, 14.3, 100.0))
def test_clip(scale: float, dtype: torch.dtype, normalize: bool, backend: str) -> None:
    wide = dtype if dtype == torch.float64 else torch.float32
    image, text = (normal(13, 6, seed=k).to(dtype).mul(0.6).requires_grad_() for k in (0, 1))
    factor = torch.tensor(scale, dtype=wide, requires_grad=True)
    truth = solve(clip_formula, image, 1 / factor.item(), text, normalize=normalize)
    with fastcl.backend(backend), small_tiles(chunked, 5, 7):
        loss = fastcl.clip_loss(image, text, factor, normalize)
        *grads, grad_factor = torch.autograd.grad(loss, (image, text, factor))
        assert torch.equal(fastcl.CLIPLoss(normalize)(image, text, factor), loss)
        assert_loss(fastcl.clip_loss(image, text, factor.item(), normalize), truth, dtype)
        torch.testing.assert_close(fastcl.clip_loss(text, image, factor, normalize), loss, rtol=1e-6, atol=1e-6)
    assert_loss(loss, truth, dtype)
    assert_gradients(grads, truth)
    assert_temperature(-(factor**2) * grad_factor, truth, dtype)  # d / d (1 / scale)


@both_backends
def test_clip_of_one_pair_is_nothing(backend: str) -> None:
    image = normal(1, 4).requires_grad_()
    with fastcl.backend(backend):
        loss = fastcl.clip_loss(image, normal(1, 4, seed=1), 10.0)
    (grad,) = torch.autograd.grad(loss, image)
    assert loss == 0 and not grad.any()


@both_backends
def test_several_losses_from_one_pass(backend: str) -> None:
    z, sample = normal(14, 5).float(), torch.arange(7).repeat(2)
    with fastcl.backend(backend):
        for reduction in ("mean", "sum", "none"):
            losses = fastcl.contrastive_losses(z, sample, LABELS.repeat(2), list(FORMULAS), 0.3, reduction)
            assert list(losses) == list(FORMULAS)
            for name, loss in losses.items():
                alone = fastcl.contrastive_loss(z, sample, LABELS.repeat(2), name, 0.3, reduction)
                torch.testing.assert_close(loss, alone, rtol=1e-6, atol=1e-6)  # peers may be summed apart
        raw = fastcl.contrastive_losses(z, sample, LABELS.repeat(2), ["dcl"], 0.3, normalize=False)
    assert list(fastcl.contrastive_losses(z, sample, LABELS.repeat(2))) == ["dcl", "nscl"]
    truth = solve(row_losses("dcl", masks(sample, LABELS.repeat(2))), z, 0.3, normalize=False)
    assert_loss(raw["dcl"], truth, z.dtype)


@two_views
def test_modules_learn_their_temperature(name, function, module, options, labelled, default) -> None:
    temperature = nn.Parameter(torch.tensor(0.3))
    loss = module(temperature, **options)
    assert dict(loss.named_parameters()) == {"temperature": temperature}
    assert not list(module(0.3, **options).parameters()) and "temperature=0.3" in repr(module(0.3, **options))
    arguments = (normal(7, 5).float(), normal(7, 5, seed=1).float(), *((LABELS,) if labelled else ()))
    before = loss(*arguments)
    before.backward()
    assert temperature.grad != 0
    torch.optim.SGD(loss.parameters(), lr=1e-3).step()
    assert loss(*arguments) < before
    fixed = function(*arguments, temperature=temperature.item(), **options)
    torch.testing.assert_close(loss(*arguments).detach(), fixed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("backend", "inside"), (("dense", False), ("chunked", False), ("chunked", True)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, backend: str, inside: bool) -> None:
    """`inside`: backward, too, which PyTorch advises against and which the chunked operator does not mind."""
    runs = []
    for enabled in (False, True):
        z1, z2 = (normal(24, 8, seed=k).to(dtype).requires_grad_() for k in (0, 1))
        with fastcl.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert (z1 @ z2.T).dtype == (torch.bfloat16 if enabled else dtype)
            losses = [fastcl.supcon_loss(z1, z2, torch.arange(24) % 3, 0.1), fastcl.clip_loss(z1, z2, 10.0)]
            if inside:
                sum(losses).backward()
        if not inside:
            sum(losses).backward()
        assert all(loss.dtype == torch.float32 for loss in losses)
        runs.append((*losses, z1.grad, z2.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_backends_are_chosen_nested_and_restored() -> None:
    def ran() -> str:
        fastcl.ntxent_loss(normal(2, 3), normal(2, 3, seed=1))
        return fastcl.last_backend()

    automatic = ran()
    assert automatic in BACKENDS
    with fastcl.backend("dense"):
        assert ran() == "dense"
        with fastcl.backend("chunked"):
            assert ran() == "chunked"
            with fastcl.backend("auto"):
                assert ran() == automatic
        assert ran() == "dense"
        with pytest.raises(ZeroDivisionError), fastcl.backend("chunked"):
            raise ZeroDivisionError
        with pytest.raises(FastclError, match=r"backend .*dense.*'dence'"), fastcl.backend("dence"):
            pass
        assert ran() == "dense"
    assert ran() == automatic


X, Y, IDS, IDS_Y = normal(4, 3), normal(5, 3), torch.arange(4), torch.arange(5)


def stats(x=X, y=None, **changes) -> None:
    fastcl.row_stats(x, y, **({"sample": IDS, "temperature": 0.5} | changes))


def cross(x=X, y=Y, **changes) -> None:
    stats(x, y, **({"sample_y": IDS_Y} | changes))


# Each call with what its message has to say: the argument's own name first.
BAD = [
    *((lambda t=t: stats(temperature=t), ("temperature", repr(t)))
      for t in (0, -0.5, math.inf, math.nan, True, "0.5", None)),
    *((lambda t=t: stats(temperature=torch.tensor(t)), ("temperature", repr(t))) for t in (0.0, -2.0, math.nan)),
    (lambda: stats(temperature=torch.ones(2)), ("temperature", "(2,)")),
    (lambda: stats(temperature=torch.tensor(1)), ("temperature", "int64")),
    (lambda: stats([[1.0]]), ("x", "list")),
    (lambda: stats(X[0]), ("x", "(3,)")),
    (lambda: stats(X[None]), ("x", "(1, 4, 3)")),
    (lambda: stats(X[:0], sample=IDS[:0]), ("x", "(0, 3)")),
    (lambda: stats(X[:, :0]), ("x", "(4, 0)")),
    (lambda: stats(X.long()), ("x", "int64")),
    (lambda: stats(X.to(torch.complex64)), ("x", "complex64")),
    (lambda: cross(y=7), ("y", "int")),
    (lambda: cross(y=Y[:, :2]), ("y", "(5, 2)", "(4, 3)")),
    (lambda: cross(y=Y.float()), ("y", "float32", "float64")),
    (lambda: cross(y=Y.to("meta")), ("y", "meta", "cpu")),
    (lambda: stats(sample=None), ("sample",)),
    (lambda: stats(sample=[0, 1, 2, 3]), ("sample", "list")),
    (lambda: stats(sample=IDS.double()), ("sample", "float64")),
    (lambda: stats(sample=IDS > 1), ("sample", "bool")),
    (lambda: stats(sample=IDS[:3]), ("sample", "4", "(3,)")),
    (lambda: stats(sample=IDS[:, None]), ("sample", "(4, 1)")),
    (lambda: stats(sample=IDS.to("meta")), ("sample", "meta", "cpu")),
    (lambda: stats(labels=IDS[:3]), ("labels", "4", "(3,)")),
    (lambda: stats(labels=IDS.float()), ("labels", "float32")),
    (lambda: stats(labels=3), ("labels", "int")),
    (lambda: stats(sample=IDS // 2, labels=IDS + 10), ("labels", "sample 0", "10", "11")),
    (lambda: stats(sample_y=IDS), ("sample_y", "y")),
    (lambda: stats(labels_y=IDS), ("labels_y", "y")),
    (lambda: cross(sample_y=None), ("sample_y", "required")),
    (lambda: cross(sample_y=IDS), ("sample_y", "5", "(4,)")),
    (lambda: cross(labels=IDS), ("labels_y", "required")),
    (lambda: cross(labels_y=IDS_Y), ("labels_y", "labels")),
    (lambda: cross(labels=IDS, labels_y=IDS), ("labels_y", "5", "(4,)")),
    (lambda: cross(labels=IDS, labels_y=IDS_Y + 1), ("labels", "sample 0", "0", "1")),
    (lambda: fastcl.contrastive_loss(X[0], IDS), ("z", "(3,)")),
    (lambda: fastcl.contrastive_loss(X, IDS, objective="nscl"), ("labels", "'nscl'")),
    (lambda: fastcl.contrastive_loss(X, IDS, objective="nxtent"), ("objective", "'nxtent'", "'ntxent'")),
    (lambda: fastcl.contrastive_loss(X, IDS, objective=3), ("objective", "3")),
    (lambda: fastcl.contrastive_loss(X, IDS, reduction="avg"), ("reduction", "mean", "'avg'")),
    (lambda: fastcl.contrastive_losses(X, IDS, objectives=["supcon"]), ("labels", "'supcon'")),
    (lambda: fastcl.contrastive_losses(X, IDS, IDS, reduction=""), ("reduction", "''")),
    (lambda: fastcl.ntxent_loss(X, Y), ("z1", "z2", "(4, 3)", "(5, 3)")),
    (lambda: fastcl.ntxent_loss(X, X.float()), ("z1", "z2", "float32", "float64")),
    (lambda: fastcl.ntxent_loss(X[0], X[0]), ("z1", "(3,)")),
    (lambda: fastcl.ntxent_loss(X, "z"), ("z2", "str")),
    (lambda: fastcl.ntxent_loss(X[:0], X[:0]), ("z1", "(0, 3)")),
    (lambda: fastcl.dcl_loss(X.long(), X.long()), ("z1", "int64")),
    (lambda: fastcl.dcl_loss(X, X, reduction="all"), ("reduction", "'all'")),
    (lambda: fastcl.nscl_loss(X, X, IDS[:3]), ("labels", "4", "(3,)")),
    (lambda: fastcl.supcon_loss(X, X, IDS.double()), ("labels", "float64")),
    (lambda: fastcl.supcon_loss(X, X, IDS[None]), ("labels", "(1, 4)")),
    (lambda: fastcl.clip_loss(X, Y, 1.0), ("image", "text", "(4, 3)", "(5, 3)")),
    (lambda: fastcl.clip_loss(X[0], X, 1.0), ("image", "(3,)")),
    (lambda: fastcl.clip_loss(X[:0], X[:0], 1.0), ("image", "(0, 3)")),
    *((lambda v=v: fastcl.clip_loss(X, X, v), ("logit_scale", repr(v)))
      for v in (0, -1.5, math.nan, math.inf, True, "2")),
    *((lambda v=v: fastcl.clip_loss(X, X, torch.tensor(v)), ("logit_scale", repr(v))) for v in (0.0, -2.0, math.inf)),
    (lambda: fastcl.clip_loss(X, X, torch.ones(2)), ("logit_scale", "(2,)")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD, ids=[f"{k}-{words[0]}" for k, (_, words) in enumerate(BAD)])
def test_bad_input(call, words: tuple[str, ...]) -> None:
    with pytest.raises(FastclError) as error:
        call()
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", str(error.value)), f"{word!r} is not in: {error.value}"


def test_forward_mode_is_refused_by_chunked_and_right_on_dense() -> None:
    z, v = normal(8, 3), normal(8, 3, seed=1)
    with pytest.raises(FastclError, match="forward-mode.*dense"):
        torch.func.jvp(lambda q: fastcl.contrastive_loss(q, torch.arange(8) // 2), (z,), (v,))
    with fastcl.backend("dense"):
        _, got = torch.func.jvp(lambda q: fastcl.contrastive_loss(q, torch.arange(8) // 2), (z,), (v,))
        up, down = (fastcl.contrastive_loss(z + e * v, torch.arange(8) // 2) for e in (1e-6, -1e-6))
    assert got.item() == pytest.approx((up - down).item() / 2e-6, rel=1e-6)
