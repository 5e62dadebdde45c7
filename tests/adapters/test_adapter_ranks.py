"""The adapters' distributed options on three ranks: the value on each and the gradient with its factor."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import originals
import pytest
import torch
from gloo_ranks import WORLD, Pool, ranks  # noqa: F401
from originals import against, dcl, inside_sum, loaded, nt_xent, sigmoid, unit, with_mask
from reference import normal
from torch import Tensor

from fastcl.adapters import inf_cl, lightly, open_clip, solo_learn, stable_pretraining, understanding_ssl, vissl
from fastcl.adapters.in_batch import in_batch_loss

pytestmark = pytest.mark.dist
B, D = 4, 5
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
ALL, T = WORLD * B, 0.3
LABELS = torch.tensor([0, -1, 2, 0, 2, 2, 5, -1, 5, 0, 0, 2])


class Case(NamedTuple):
    """An adapter on a rank, row losses of all ranks' rows together, and how the original reduces and differentiates.

    Adapters get (rank, first, second, scale), the rows (B, D) of the rank; formulas the rows (ALL, D).
    """

    name: str
    ours: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    formula: Callable[[Tensor, Tensor, Tensor], Tensor]  # (..., ALL): one row for each direction or view
    is_local: bool = True  # the value is that of the rank's own rows; False: of all
    factor: float = WORLD  # of the global loss's gradient, on each rank; the average over ranks of WORLD is exact
    original: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None


def clip_rows(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    to = torch.arange(ALL)
    return torch.stack([against(a, b, to, scale, False), against(b, a, to, scale, False)])


def published(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    z, both = unit(torch.cat([a, b])), LABELS.repeat(2)
    same = (both[:, None] == both) & originals.others(2 * ALL)
    return with_mask(z, same.double(), 0.5, None, 1e-9)


def in_batch(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    q, d, outside = unit(a), unit(b), torch.eye(ALL, dtype=torch.bool)
    alike = [(v @ v.T).masked_fill(outside, -torch.inf) for v in (q, d)]
    return (torch.cat([q @ d.T, d @ q.T, *alike], 1) * 2).logsumexp(1) - 2 * (q * d).sum(1)


def clip_of(options: dict[str, bool], loss: Any = open_clip.ClipLoss) -> Callable[..., Tensor]:
    return lambda rank, a, b, s: loss(**options, rank=rank, world_size=WORLD)(a, b, s.reshape(()))


def own(labels: Tensor, rank: int) -> Tensor:
    return labels[rank * B : (rank + 1) * B]


def buffers() -> Any:
    return type("Buffers", (), {"effective_batch_size": 2 * ALL, "world_size": WORLD, "embedding_dim": D})


def their_clip(options: dict[str, bool]) -> Callable[..., Tensor]:
    return lambda *args: clip_of(options, loaded("open_clip", "loss.py").ClipLoss)(*args)


def siglip_of(how: str, loss: Any = open_clip.SigLipLoss) -> Callable[..., Tensor]:
    return lambda rank, a, b, s: loss(rank=rank, world_size=WORLD, dist_impl=how)(a, b, s.reshape(()), -s)


def their_siglip(how: str) -> Callable[..., Tensor]:
    return lambda *args: siglip_of(how, loaded("open_clip", "loss.py").SigLipLoss)(*args)


def wrapped(module: str) -> Callable[..., Tensor]:
    """SupConLoss in pytorch-metric-learning's wrapper, which multiplies the loss of all rows by the number of ranks."""

    def loss(rank: int, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        wrapper = loaded("pytorch_metric_learning", "utils/distributed.py").DistributedLossWrapper
        return wrapper(import_module(module).SupConLoss(T))(a, own(LABELS, rank))

    return loss


CLASSES = ((LABELS[:, None] == LABELS) & originals.others(ALL)).double()
EXCHANGES = ("bidir", "shift", "reduce", "gather")
LOCAL, GRAD, BOTH = {"local_loss": True}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}
CASES = [
    Case("lightly", lambda rank, a, b, s: lightly.NTXentLoss(T, gather_distributed=True)(a, b),
         lambda a, b, s: nt_xent(a, b, T),
         original=lambda rank, a, b, s: loaded("lightly", "loss/ntx_ent_loss.py").NTXentLoss(T, 0, True)(a, b)),
    Case("lightly, T < 0", lambda rank, a, b, s: lightly.NTXentLoss(-T, gather_distributed=True)(a, b),
         lambda a, b, s: nt_xent(a, b, -T)),
    Case("lightly DCLW", lambda rank, a, b, s: lightly.DCLLoss(T, lambda x, y: x[:, 0], gather_distributed=True)(a, b),
         lambda a, b, s: dcl(a, b, T, torch.cat([unit(a)[:, 0], unit(b)[:, 0]]))),
    Case("open_clip, local, with gradient", clip_of(BOTH), clip_rows, original=their_clip(BOTH)),
    Case("open_clip, with gradient", clip_of(GRAD), clip_rows, is_local=False, original=their_clip(GRAD)),
    Case("open_clip", clip_of({}), clip_rows, is_local=False, factor=1, original=their_clip({})),
    *(Case(f"open_clip SigLIP, {how}", siglip_of(how), lambda a, b, s: sigmoid(a, b, s, -s),
            original=their_siglip(how)) for how in EXCHANGES),
    Case("solo, classes", lambda rank, a, b, s: solo_learn.simclr_loss_func(a, own(LABELS / 4, rank), T),  # floats
         lambda a, b, s: inside_sum(a, LABELS, T)),
    Case("solo, MoCo v3", lambda rank, a, b, s: solo_learn.mocov3_loss_func(a, b, T) / (2 * T),
         lambda a, b, s: against(a, b.detach(), torch.arange(ALL), 1 / T)),
    Case("solo, NNCLR", lambda rank, a, b, s: solo_learn.nnclr_loss_func(a, b, T),
         lambda a, b, s: against(a, b, torch.arange(ALL), 1 / T)),
    Case("stable, NT-Xent", lambda rank, a, b, s: stable_pretraining.NTXEntLoss(T)(a, b),
         lambda a, b, s: nt_xent(a, b, T),
         original=lambda rank, a, b, s: loaded("stable_pretraining", "losses/joint_embedding.py").NTXEntLoss(T)(a, b)),
    Case("stable, CLIP", lambda rank, a, b, s: stable_pretraining.CLIPLoss()(a, b, 1 / s),
         lambda a, b, s: clip_rows(unit(a), unit(b), s),
         original=lambda rank, a, b, s: loaded("stable_pretraining", "losses/multimodal.py").CLIPLoss()(a, b, 1 / s)),
    Case("metric_learning", wrapped("fastcl.adapters.metric_learning"),
         lambda a, b, s: with_mask(unit(a), CLASSES, T) * WORLD, is_local=False, factor=1,
         original=wrapped("pytorch_metric_learning.losses")),
    Case("vissl", lambda rank, a, b, s: vissl.SimclrInfoNCECriterion(buffers(), T)(torch.cat([a, b])),
         lambda a, b, s: nt_xent(a, b, T, normalize=False)),
    Case("sentence-transformers", lambda rank, a, b, s: in_batch_loss([a, b], 2.0, DIRECTIONS, gathers=True), in_batch),
    Case("sentence-transformers, per direction",
         lambda rank, a, b, s: in_batch_loss([a, b, -b], 2.0, DIRECTIONS[::2], "per_direction", gathers=True),
         lambda a, b, s: torch.stack([against(a, torch.cat([b, -b]), torch.arange(ALL), 2.0),
                                      against(b, a, torch.arange(ALL), 2.0)])),
    Case("inf_cl", lambda rank, a, b, s: inf_cl.cal_inf_loss(a, b, scale=s),
         lambda a, b, s: against(a, b, torch.arange(ALL), s, False)),
    Case("published scl", lambda rank, a, b, s: understanding_ssl.SupConLoss()(a, b, own(LABELS, rank)), published,
         is_local=False, factor=1),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}


def leaves_of(rank: int | None) -> list[Tensor]:
    """Both views and the scale; those of a rank, or of all."""
    rows = [unit(normal(ALL, D, seed=k)) for k in (1, 2)]
    rows = rows if rank is None else [own(v, rank).clone() for v in rows]
    return [v.requires_grad_() for v in (*rows, torch.tensor([2.0], dtype=torch.float64))]


def on_rank(rank: int, name: str, which: str) -> list[Tensor] | str:
    case, leaves = BY_NAME[name], leaves_of(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return originals.value_and_gradients(getattr(case, which)(rank, *leaves), leaves)
        except pytest.skip.Exception as reason:
            return str(reason)


@pytest.mark.parametrize("name", BY_NAME)
def test_value_and_gradient(ranks: Pool, name: str) -> None:  # noqa: F811
    case, leaves = BY_NAME[name], leaves_of(None)
    rows = case.formula(*leaves).view(-1, ALL)
    _, *gradients = originals.value_and_gradients(rows.mean(), leaves)
    for which in ("ours", "original")[: 1 + (case.original is not None)]:
        found = ranks.run(on_rank, name, which)
        if isinstance(found[0], str):
            pytest.skip(found[0])
        for rank, (value, first, second, _) in enumerate(found):
            want = own(rows.T, rank).mean() if case.is_local else rows.mean()
            torch.testing.assert_close(value, want.detach(), rtol=1e-9, atol=1e-9)
            for got, whole in ((first, gradients[0]), (second, gradients[1])):
                torch.testing.assert_close(got, case.factor * own(whole, rank), rtol=1e-9, atol=1e-9)
        scale = torch.stack([one[3] for one in found]).mean(0)
        scale /= WORLD if name == "inf_cl" else 1  # which adds it up on every rank
        torch.testing.assert_close(scale, gradients[2], rtol=1e-9, atol=1e-9)


def logits(rank: int, which: str) -> list[Any] | str:
    """Logits and their gradients for all options of ClipLoss, and SigLipLoss's logits."""
    try:
        module = open_clip if which == "ours" else loaded("open_clip", "loss.py")
    except pytest.skip.Exception as reason:
        return str(reason)
    found = []
    for options in ({}, LOCAL, GRAD, BOTH):
        a, b, s = leaves = leaves_of(rank)
        made = module.ClipLoss(**options, rank=rank, world_size=WORLD).get_logits(a, b, s, -s)
        found += [v.detach() for v in made] + originals.value_and_gradients(made[0].sin() + 2 * made[1].cos(), leaves)
    return [*found, module.SigLipLoss(rank=rank, world_size=WORLD).get_logits(a, b, s, -s).detach()]


def test_logits_of_open_clip(ranks: Pool) -> None:  # noqa: F811
    ours, theirs = (ranks.run(logits, which) for which in ("ours", "original"))
    if isinstance(theirs[0], str):
        pytest.skip(theirs[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def local_clip(rank: int, which: str) -> list[Tensor] | list[str] | str:
    leaves = leaves_of(rank)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call = clip_of(LOCAL) if which == "ours" else their_clip(LOCAL)
            found = [originals.value_and_gradients(call(rank, *leaves), leaves) for _ in range(2)]
    except pytest.skip.Exception as reason:
        return str(reason)
    told = [one for one in seen if "as in open_clip" in str(one.message)]
    assert len(told) == (which == "ours")  # once, not for every call
    return found[0]


def test_open_clips_local_loss_without_gradients_of_candidates(ranks: Pool) -> None:  # noqa: F811
    for which in ("ours", "original"):
        found = ranks.run(local_clip, which)
        if isinstance(found[0], str):
            pytest.skip(found[0])
        everyone = [v.detach() for v in leaves_of(None)]
        for rank, got in enumerate(found):
            a, b, s = leaves = leaves_of(rank)
            to = torch.arange(B) + rank * B
            loss = (against(a, everyone[1], to, s, False) + against(b, everyone[0], to, s, False)).mean() / 2
            torch.testing.assert_close(got, originals.value_and_gradients(loss, leaves), rtol=1e-9, atol=1e-9)


def bank(rank: int, gathers: bool) -> tuple[Tensor, int]:
    loss = lightly.NTXentLoss(T, (ALL + 2, D), gathers).double()
    loss(*leaves_of(rank)[:2])
    return loss.memory_bank.bank, int(loss.memory_bank.bank_ptr)


def test_lightlys_bank_takes_the_rows_of_all_ranks(ranks: Pool) -> None:  # noqa: F811
    keys = leaves_of(None)[1].detach()
    for gathers in (True, False):
        for rank, (rows, place) in enumerate(ranks.run(bank, gathers)):
            want = keys if gathers else own(keys, rank)
            assert place == len(want)
            torch.testing.assert_close(rows[:place], want)
