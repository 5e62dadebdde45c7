"""Every adapter against the formula of its original and, where that is installed, against the original itself."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import originals
import pytest
import torch
from originals import against, dcl, inside_sum, loaded, nt_xent, queue, unit, value_and_gradients, with_mask
from reference import normal
from torch import Tensor

from bench.losses import plain
from bench.training import speed
from fastcl.adapters import (
    inf_cl,
    info_nce,
    lightly,
    open_clip,
    solo_learn,
    stable_pretraining,
    supcontrast,
    understanding_ssl,
    vissl,
)

B, K, D = 7, 11, 6
IDS, VIEWS = torch.arange(B), torch.eye(B, dtype=torch.bool).repeat(2, 2)
LABELS = torch.tensor([0, -1, 0, 2, -1, 0, 5])
TARGETS = torch.tensor([3, 0, 10, 4, 4, 1, 7])
SAME = LABELS[:, None] == LABELS
TWO, ROWS, PAIRS = ((B, D), (B, D)), ((B, D), (K, D)), ((B, D), (B, D), (1,))
UNEVEN = torch.tensor([4, -1, 4, 4, -1, 7, 7])  # no class of one row


class Case(NamedTuple):
    """An adapter, the formula of its original and the call of the original itself, as functions of the leaves."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    original: Callable[..., Tensor] | None = None  # None: it is on no registry, or runs on GPUs alone
    unit: bool = False  # the caller normalises
    logits: float = 0.5  # the largest; a loss is the difference of two, each known to 2^-23 of it


def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return (against(image, text, IDS, scale, False) + against(text, image, IDS, scale, False)).mean() / 2


def supcon(features: Tensor, mask: Tensor, one: bool = False, temperature: float = 0.07, base: float = 0.07) -> Tensor:
    views = features.shape[1]
    z = features.transpose(0, 1).flatten(2).reshape(B * views, -1)
    positives = mask.to(z.dtype).repeat(views, views) * originals.others(len(z))
    rows = with_mask(z, positives, temperature)
    return (rows[:B] if one else rows).mean() * temperature / base


def published(kind: str, z1: Tensor, z2: Tensor, labels: Tensor = LABELS) -> Tensor:
    z, both = unit(torch.cat([z1, z2])), labels.repeat(2)
    same = (both[:, None] == both) & originals.others(2 * B)
    negatives = ~same & originals.others(2 * B) if kind == "hybrid" else None
    return with_mask(z, same.to(z.dtype), 0.5, negatives, 1e-9).mean()


def nscl_published(z1: Tensor, z2: Tensor) -> Tensor:
    z, both = unit(torch.cat([z1, z2])), LABELS.repeat(2)
    s, positive = z @ z.T / 0.5, (z * z.roll(B, 0)).sum(1) / 0.5
    return (torch.logaddexp(originals.lse(s, both[:, None] != both), positive) - positive).mean()


def weights_of(a: Tensor, b: Tensor) -> Tensor:
    return 1 + (a - b).square().sum(1)


def lightly_weighted(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    return dcl(a, b, 0.1, weights).mean()


def mises_fisher(a: Tensor, b: Tensor) -> Tensor:
    return (2 - B * ((unit(a) * unit(b)).sum(1) / 0.4).softmax(0)).detach()


def peer(package: str, name: str, file: str = "") -> Callable[..., Any]:
    """A name of an original, found when it is called."""
    return lambda *args, **options: getattr(loaded(package, file), name)(*args, **options)


EXTRA = torch.rand(2 * B, 2 * B, generator=torch.Generator().manual_seed(0)) < 0.3
ASYMMETRIC = torch.rand(B, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def clip_with_bias(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return open_clip.ClipLoss()(image, text, scale.exp(), bias, output_dict=True)["contrastive_loss"]


def extra_positives(a: Tensor, b: Tensor) -> Tensor:
    z, positives = unit(torch.cat([a, b])), (VIEWS & originals.others(2 * B)) | EXTRA
    return with_mask(z, positives.to(z.dtype), 0.3).mean()


their_clip = peer("open_clip", "ClipLoss", "loss.py")
their_nce = peer("info_nce", "info_nce")
their_infonce = peer("stable_pretraining", "InfoNCELoss", "losses/joint_embedding.py")
their_simclr = peer("solo", "simclr_loss_func", "losses/simclr.py")
buffers = type("Buffers", (), {"effective_batch_size": 2 * B, "world_size": 1, "embedding_dim": D})
CASES = [
    Case("lightly", TWO, lightly.NTXentLoss(0.2), lambda a, b: nt_xent(a, b, 0.2).mean(),
         lambda a, b: peer("lightly", "NTXentLoss", "loss/ntx_ent_loss.py")(0.2)(a, b)),
    Case("lightly, T < 0", TWO, lightly.NTXentLoss(-0.5), lambda a, b: nt_xent(a, b, -0.5).mean(),
         lambda a, b: peer("lightly", "NTXentLoss", "loss/ntx_ent_loss.py")(-0.5)(a, b)),
    Case("lightly DCL", TWO, lightly.DCLLoss(), lambda a, b: dcl(a, b, 0.1).mean(),
         lambda a, b: peer("lightly", "DCLLoss", "loss/dcl_loss.py")()(a, b)),
    Case("lightly DCL, weights", TWO, lightly.DCLLoss(weight_fn=weights_of),
         lambda a, b: lightly_weighted(a, b, weights_of(unit(a), unit(b))),
         lambda a, b: peer("lightly", "DCLLoss", "loss/dcl_loss.py")(weight_fn=weights_of)(a, b)),
    Case("lightly DCL, one weight", TWO, lightly.DCLLoss(weight_fn=lambda a, b: a[0, 0]),
         lambda a, b: lightly_weighted(a, b, torch.stack([unit(a)[0, 0], unit(b)[0, 0]]).repeat_interleave(B)),
         lambda a, b: peer("lightly", "DCLLoss", "loss/dcl_loss.py")(weight_fn=lambda a, b: a[0, 0])(a, b)),
    Case("lightly DCLW", TWO, lightly.DCLWLoss(sigma=0.4), lambda a, b: lightly_weighted(a, b, mises_fisher(a, b)),
         lambda a, b: peer("lightly", "DCLWLoss", "loss/dcl_loss.py")(sigma=0.4)(a, b)),
    Case("open_clip", PAIRS, lambda a, b, s: open_clip.ClipLoss()(a, b, s.exp()), lambda a, b, s: clip(a, b, s.exp()),
         lambda a, b, s: their_clip()(a, b, s.exp()), unit=True),
    Case("open_clip, bias", (*PAIRS, (1,)), clip_with_bias,
         lambda a, b, s, c: clip(a, b, s.exp()), lambda a, b, s, c: their_clip()(a, b, s.exp(), c), unit=True),
    Case("supcontrast", ((B, 2, D),), supcontrast.SupConLoss(), lambda f: supcon(f, IDS[:, None] == IDS), unit=True),
    Case("supcontrast, labels", ((B, 3, 2, D),), lambda f: supcontrast.SupConLoss(0.2)(f, LABELS[:, None]),
         lambda f: supcon(f, SAME, temperature=0.2)),
    Case("supcontrast, one class", ((B, 2, D),), lambda f: supcontrast.SupConLoss()(f, torch.zeros(B)),
         lambda f: supcon(f, torch.ones(B, B)), unit=True),
    Case("supcontrast, one view", ((B, 1, D),), lambda f: supcontrast.SupConLoss(0.3)(f, LABELS.double() / 2),
         lambda f: supcon(f, SAME, temperature=0.3)),
    Case("supcontrast, mode one", ((B, 2, D),), lambda f: supcontrast.SupConLoss(0.2, "one", 0.1)(f, LABELS),
         lambda f: supcon(f, SAME, True, 0.2, 0.1)),
    Case("supcontrast, mask", ((B, 2, D),), lambda f: supcontrast.SupConLoss(0.2)(f, mask=SAME),
         lambda f: supcon(f, SAME, temperature=0.2)),
    Case("supcontrast, weights", ((B, 2, D),), lambda f: supcontrast.SupConLoss(0.2, "one")(f, mask=ASYMMETRIC),
         lambda f: supcon(f, ASYMMETRIC, True, temperature=0.2)),
    *(Case(f"info_nce, {how}", TWO, lambda a, b, how=how: info_nce.info_nce(a, b, reduction=how),
           lambda a, b, how=how: against(a, b, IDS, 10) if how == "none" else getattr(against(a, b, IDS, 10), how)(),
           lambda a, b, how=how: their_nce(a, b, reduction=how)) for how in ("none", "mean", "sum")),
    Case("info_nce, unpaired", (*TWO, (K, D)), info_nce.InfoNCE(0.2), lambda a, b, c: queue(a, b, c, 0.2).mean(),
         lambda a, b, c: their_nce(a, b, c, 0.2)),
    Case("info_nce, paired", (*TWO, (B, 4, D)), info_nce.InfoNCE(0.2, "none", "paired"),
         lambda a, b, c: queue(a, b, c, 0.2),
         lambda a, b, c: their_nce(a, b, c, 0.2, "none", "paired")),
    Case("solo, z1 and z2", TWO, lambda a, b: solo_learn.simclr_loss_func(z1=a, z2=b),
         lambda a, b: nt_xent(a, b, 0.1).mean(), lambda a, b: their_simclr(a, b)),
    Case("solo, extra positives", TWO, partial(solo_learn.simclr_loss_func, temperature=0.3, extra_pos_mask=EXTRA),
         extra_positives, lambda a, b: their_simclr(a, b, 0.3, EXTRA)),
    Case("solo, classes", ((B, D),), lambda z: solo_learn.simclr_loss_func(z, UNEVEN[IDS % 5], 0.2),
         lambda z: inside_sum(z, UNEVEN[IDS % 5], 0.2).mean()),
    Case("solo, MoCo v2+", (*TWO, (D, K)), lambda q, k, m: solo_learn.mocov2plus_loss_func(q, k, m.detach(), 0.5),
         lambda q, k, m: queue(q, k, m.T.detach(), 0.5, False).mean(),
         lambda q, k, m: peer("solo", "moco_loss_func", "losses/moco.py")(q, k, m.detach(), 0.5)),
    Case("solo, MoCo v3", TWO, solo_learn.mocov3_loss_func, lambda q, k: against(q, k, IDS, 5).mean() * 0.4),
    Case("solo, NNCLR", TWO, solo_learn.nnclr_loss_func, lambda n, p: against(n, p, IDS, 10).mean(),
         lambda n, p: peer("solo", "nnclr_loss_func", "losses/nnclr.py")(n, p)),
    Case("stable, InfoNCE", ROWS, lambda a, c: stable_pretraining.InfoNCELoss()(a, c, TARGETS),
         lambda a, c: against(a, c, TARGETS, 1 / 0.07).mean(), lambda a, c: their_infonce()(a, c, TARGETS)),
    Case("stable, ignored", ROWS,
         lambda a, c: stable_pretraining.InfoNCELoss()(a, c, torch.where(IDS < 2, -100, TARGETS)),
         lambda a, c: against(a[2:], c, TARGETS[2:], 1 / 0.07).mean(),
         lambda a, c: their_infonce()(a, c, torch.where(IDS < 2, -100, TARGETS)), logits=1 / 0.07),
    Case("stable, NT-Xent", TWO, stable_pretraining.NTXEntLoss(), lambda a, b: nt_xent(a, b, 0.5).mean(),
         lambda a, b: peer("stable_pretraining", "NTXEntLoss", "losses/joint_embedding.py")()(a, b)),
    Case("stable, CLIP", PAIRS, lambda a, b, s: stable_pretraining.CLIPLoss()(a, b, s.exp()),
         lambda a, b, s: clip(unit(a), unit(b), 1 / s.exp()),
         lambda a, b, s: peer("stable_pretraining", "CLIPLoss", "losses/multimodal.py")()(a, b, s.exp())),
    Case("vissl", ((2 * B, D),), vissl.SimclrInfoNCECriterion(buffers, 0.1),
         lambda z: nt_xent(*z.chunk(2), 0.1, normalize=False).mean(), unit=True),
    Case("inf_cl, flash", (*ROWS, (1,)), lambda q, k, s: inf_cl.cal_flash_loss(q, k, TARGETS, s.exp()),
         lambda q, k, s: against(q, k, TARGETS, s.exp(), False)),
    Case("inf_cl, ring", TWO, inf_cl.cal_ring_loss, lambda q, k: against(q, k, IDS, 1.0, False).mean()),
    Case("published cl", TWO, lambda a, b: understanding_ssl.NTXentLoss()(a, b, LABELS),
         lambda a, b: nt_xent(a, b, 0.5, True).mean()),
    Case("published dcl", TWO, understanding_ssl.DecoupledNTXentLoss(0.2), lambda a, b: nt_xent(a, b, 0.2).mean()),
    Case("published nscl", TWO, lambda a, b: understanding_ssl.NegSupConLoss()(a, b, LABELS), nscl_published),
    Case("published scl", TWO, lambda a, b: understanding_ssl.SupConLoss()(a, b, LABELS),
         lambda a, b: published("scl", a, b)),
    Case("published hybrid", TWO, lambda a, b: understanding_ssl.HybridSupConLoss()(a, b, LABELS),
         lambda a, b: published("hybrid", a, b)),
    Case("published hybrid, one class", TWO, lambda a, b: understanding_ssl.HybridSupConLoss()(a, b, 0 * LABELS),
         lambda a, b: published("hybrid", a, b, 0 * LABELS)),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def leaves_of(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    made = [normal(*shape, seed=seed + k) for k, shape in enumerate(case.shapes)]
    made = [unit(v) if case.unit and v.ndim > 1 else v for v in made]
    return [v.float().to(dtype).requires_grad_() for v in made]


def found(case: Case, call: Callable[..., Tensor], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    leaves = leaves_of(case, dtype, seed)
    return value_and_gradients(call(*leaves), leaves)


@each_case
def test_float64(case: Case) -> None:
    for seed in (0, 10):
        ours, want = (found(case, call, torch.float64, seed) for call in (case.ours, case.formula))
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [c for c in CASES if c.original], ids=[c.name for c in CASES if c.original])
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_the_original_in_float64_and_float32(case: Case) -> None:
    exact = found(case, case.original, torch.float64)
    torch.testing.assert_close(found(case, case.ours, torch.float64), exact, rtol=1e-9, atol=1e-9)
    runs = [found(case, call, torch.float32) for call in (case.ours, case.original)]
    for ours, theirs, want in zip(*runs, exact, strict=True):
        allowed = 3.5 * (theirs - want).norm() + 2.0**-23 * max(want.norm(), 2 * case.logits)
        assert ours.dtype == torch.float32 and (ours - want).norm() <= allowed


@each_case
def test_half_precision_is_computed_in_float32(case: Case) -> None:
    ours = found(case, case.ours, torch.bfloat16)
    leaves = [v.detach().double().requires_grad_() for v in leaves_of(case, torch.bfloat16)]
    want = value_and_gradients(case.formula(*leaves), leaves)
    tolerance = 2e-2 if (1,) in case.shapes else 1e-4  # the call rounds exp(scale)
    torch.testing.assert_close(ours[0].double(), want[0], rtol=tolerance, atol=1e-4)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in ours[1:])


def test_lightlys_bank() -> None:
    """Batches of 4 in a bank of 10 rows: half of the third is dropped, and the fourth begins at row 0."""
    torch.manual_seed(0)
    ours, theirs = lightly.NTXentLoss(0.1, (10, D)).double(), None
    if originals.importlib.util.find_spec("lightly"):
        torch.manual_seed(0)
        theirs = peer("lightly", "NTXentLoss", "loss/ntx_ent_loss.py")(0.1, (10, D)).double()
        assert torch.equal(ours.memory_bank.bank, theirs.memory_bank.bank)
    bank, start = ours.memory_bank.bank.clone(), 0
    for step in range(5):
        a, b = (normal(4, D, seed=2 * step + k).requires_grad_() for k in range(2))
        got = value_and_gradients(ours(a, b), (a, b))
        for want in (queue(unit(a), unit(b), bank, 0.1, False).mean(), *([theirs(a, b)] if theirs else [])):
            torch.testing.assert_close(got, value_and_gradients(want, (a, b)), rtol=1e-9, atol=1e-9)
        stop = min(start + 4, 10)
        bank[start:stop] = unit(b.detach())[: stop - start]
        start = 0 if stop == 10 else stop
        torch.testing.assert_close(ours.memory_bank.bank, bank)
        assert ours.memory_bank.bank_ptr == start
        assert theirs is None or theirs.memory_bank.bank_ptr == start
    ours(a.detach(), b)  # no gradient, no update
    torch.testing.assert_close(ours.memory_bank.bank, bank)
    assert not ours.state_dict()


@pytest.mark.filterwarnings("ignore:.* is computed by stable_pretraining itself")
def test_a_mask_goes_to_stable_pretraining_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stable_pretraining.losses.joint_embedding", None)
    a, mask = torch.ones(2, 3), torch.eye(2, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="mask.*install stable-pretraining"):
        stable_pretraining.InfoNCELoss()(a, a, IDS[:2], mask)
    monkeypatch.undo()
    loaded("stable_pretraining", "losses/joint_embedding.py")
    assert stable_pretraining.InfoNCELoss()(a, a, IDS[:2].flip(0), mask) == 0  # the one candidate that is left


def test_the_masks_of_vissl() -> None:
    loss = vissl.SimclrInfoNCECriterion(buffers, 0.1)
    assert torch.equal(loss.pos_mask, (VIEWS & originals.others(2 * B)).float())
    assert torch.equal(loss.neg_mask, (~VIEWS).float())


def test_the_step_of_the_benchmark_has_solo_learns_loss() -> None:
    z = normal(2 * B, 4)
    theirs = loaded("solo", "losses/simclr").simclr_loss_func(*z.chunk(2), temperature=plain.TEMPERATURE)
    ours = speed.masked_ntxent(z, torch.arange(B).repeat(2), plain.TEMPERATURE)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_traps_that_go_away() -> None:
    row = torch.ones(2, 3, requires_grad=True)
    zero = torch.cat([torch.zeros(1, 3), row])
    zero.retain_grad()
    lightly.NTXentLoss()(zero, zero.detach() + 1).backward()
    assert torch.equal(zero.grad[0], torch.zeros(3))
    z = normal(3, 4).requires_grad_()
    loss = solo_learn.simclr_loss_func(z, torch.tensor([0, 0, 1]), 0.005)  # a row without a positive; exp overflows
    assert loss.isfinite() and torch.autograd.grad(loss, z)[0].isfinite().all()
    assert inf_cl.cal_flash_loss(z, z).shape == (3,)  # no GPU, and no multiple of 256 columns
