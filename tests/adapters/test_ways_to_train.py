"""How losses are used: compiled, in half precision, checkpointed, over parts of a batch, replicated and sharded.

Each adapter, and lightly's own loss where `fastcl.patch` has been, against a formula in float64.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import originals
import pytest
import torch
from gloo_ranks import WORLD, Pool, ranks  # noqa: F401
from originals import against, nt_xent, sigmoid, value_and_gradients, with_mask, without_their_init
from reference import normal
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl.adapters import info_nce, lightly, open_clip, payoff, solo_learn, stable_pretraining, supcontrast
from fastcl.adapters.in_batch import in_batch_loss

B, D, T = 6, 8, 0.5
LABELS = torch.arange(B) % 3


def supcon(a: Tensor, b: Tensor, normalize: bool = True) -> Tensor:
    z, labels = torch.cat([a, b]), LABELS.repeat(2)
    z = originals.unit(z) if normalize else z
    return with_mask(z, ((labels[:, None] == labels) & originals.others(2 * B)).to(z.dtype), T).mean()


def clip(a: Tensor, b: Tensor) -> Tensor:
    to = torch.arange(len(a))
    return (against(a, b, to, 1 / T, False) + against(b, a, to, 1 / T, False)).mean() / 2


def two_views(a: Tensor, b: Tensor) -> Tensor:
    return nt_xent(a, b, T).mean()


def one_way(a: Tensor, b: Tensor) -> Tensor:
    return against(a, b, torch.arange(B), 1 / T).mean()


def siglip(a: Tensor, b: Tensor) -> Tensor:
    return sigmoid(a, b, torch.tensor(1 / T), -1.0).mean()


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, tuple[Loss | None, Loss]] = {
    "lightly": (lightly.NTXentLoss(T), two_views),
    "patched": (None, two_views),  # lightly's own; None: made by the fixture
    "open_clip": (lambda a, b: open_clip.ClipLoss()(a, b, 1 / T), clip),
    "SigLIP": (lambda a, b: open_clip.SigLipLoss()(a, b, 1 / T, -1.0), siglip),
    "info_nce": (info_nce.InfoNCE(T), one_way),
    "in batch": (lambda a, b: in_batch_loss([a, b], 1 / T), one_way),
    "solo": (lambda a, b: solo_learn.simclr_loss_func(torch.cat([a, b]), torch.arange(B).repeat(2), T), two_views),
    "stable": (stable_pretraining.NTXEntLoss(T), two_views),
    "supcontrast": (
        lambda a, b: supcontrast.SupConLoss(T, base_temperature=T)(torch.stack([a, b], 1), LABELS),
        partial(supcon, normalize=False),
    ),
    "metric_learning": (None, supcon),
}


def own_loss_of_lightly(patch: pytest.MonkeyPatch, gathers: bool = False) -> Loss:
    """On fastcl for any number of rows, inside fastcl.patch."""
    pytest.importorskip("lightly")
    without_their_init(patch)
    patch.setattr(payoff, "FEWEST", dict.fromkeys(payoff.FEWEST, 0))
    kind = importlib.import_module("lightly.loss.ntx_ent_loss").NTXentLoss
    return kind(T, gather_distributed=gathers)


@pytest.fixture(params=LOSSES)
def losses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Loss, Loss]]:
    """An adapter and its formula."""
    ours, formula = LOSSES[request.param]
    if request.param == "metric_learning":
        pytest.importorskip("pytorch_metric_learning")
        theirs = importlib.import_module("fastcl.adapters.metric_learning").SupConLoss(T)
        yield lambda a, b: theirs(torch.cat([a, b]), LABELS.repeat(2)), formula
    elif ours is not None:
        yield ours, formula
    else:
        theirs = own_loss_of_lightly(monkeypatch)
        with fastcl.patch("lightly"):
            yield theirs, formula


def rows(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(B, D, seed=k).to(dtype).requires_grad_() for k in (1, 2)]


def encoder() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()


def gradients(loss: Tensor, network: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def test_compiled(losses: tuple[Loss, Loss]) -> None:
    ours, formula = losses
    torch.compiler.reset()  # one lambda stands for all losses, and is compiled only so often
    whole = formula is not supcon  # whose library looks at numbers of pairs
    compiled = torch.compile(lambda a, b: ours(a, b) * 2, backend="eager", fullgraph=whole)
    got, want = (value_and_gradients(f(*(leaves := rows())), leaves) for f in (compiled, formula))
    torch.testing.assert_close(got, [want[0] * 2, *(2 * v for v in want[1:])], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_with_a_scaler(losses: tuple[Loss, Loss], dtype: torch.dtype) -> None:
    """Embeddings of an encoder under autocast; float16 with its scaled loss, which has to come back unscaled."""
    ours, formula = losses
    network, (a, b) = encoder().float(), (v.detach() for v in rows(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024, enabled=dtype == torch.float16)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with torch.autocast("cpu", dtype):
        z = [network(v) for v in (a, b)]
        assert z[0].dtype == dtype
        for one in z:
            one.retain_grad()
        loss = ours(*z)
    scaler.scale(loss).backward()
    wide = [one.detach().double().requires_grad_() for one in z]
    value, *want = value_and_gradients(formula(*wide), wide)
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-5, atol=1e-6)
    scale = scaler.get_scale()
    for one, exact in zip(z, want, strict=True):
        assert (one.grad.double() / scale - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()
    before = [v.detach().clone() for v in network.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale and not any(map(torch.equal, before, network.parameters()))  # not skipped


def test_checkpointed(losses: tuple[Loss, Loss]) -> None:
    """Encoder and loss are computed again in the backward pass."""
    ours, formula = losses
    network, views = encoder(), rows()
    loss = checkpoint(lambda a, b: ours(network(a), network(b)), *views, use_reentrant=False)
    want = formula(*map(network, views))
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(loss, network), gradients(want, network), rtol=1e-9, atol=1e-9)


def test_parts_of_a_batch(losses: tuple[Loss, Loss]) -> None:
    """Features of the whole batch without a graph, then a backward pass for each part, as open_clip's accum_freq."""
    ours, formula = losses
    network, (a, b) = encoder(), rows()
    with torch.no_grad():
        kept = [[network(part) for part in v.split(2)] for v in (a, b)]
    total = torch.zeros_like(torch.cat([v.flatten() for v in network.parameters()]))
    for k, parts in enumerate(zip(a.split(2), b.split(2), strict=True)):
        sides = [[*side[:k], network(part), *side[k + 1 :]] for side, part in zip(kept, parts, strict=True)]
        total += gradients(ours(*map(torch.cat, sides)), network)
    torch.testing.assert_close(total, gradients(formula(network(a), network(b)), network), rtol=1e-9, atol=1e-9)


def on_rank(rank: int, name: str, how: str) -> Tensor:
    """The averaged gradient of all parameters."""
    if how == "ddp":
        network: nn.Module = DistributedDataParallel(encoder())
    else:
        network = fully_shard(encoder(), mesh=init_device_mesh("cpu", (WORLD,)))
    a, b = network(torch.cat([v.detach().chunk(WORLD)[rank] for v in rows()])).chunk(2)
    with pytest.MonkeyPatch.context() as patch:
        if name == "lightly":
            loss = lightly.NTXentLoss(T, gather_distributed=True)(a, b)
        elif name == "open_clip":
            options = {"local_loss": True, "gather_with_grad": True, "rank": rank, "world_size": WORLD}
            loss = open_clip.ClipLoss(**options)(a, b, 1 / T)
        else:
            theirs = own_loss_of_lightly(patch, gathers=True)
            with fastcl.patch("lightly"):
                loss = theirs(a, b)
    loss.backward()
    found = [v.grad.full_tensor() if how == "fsdp" else v.grad for v in network.parameters()]
    return torch.cat([v.flatten() for v in found])


@pytest.mark.dist
@pytest.mark.parametrize("how", ("ddp", "fsdp"))
@pytest.mark.parametrize("name", ("lightly", "patched", "open_clip"))
def test_ranks(ranks: Pool, name: str, how: str) -> None:  # noqa: F811
    if name == "patched":
        pytest.importorskip("lightly")
    network = encoder()
    want = gradients(LOSSES[name][1](*map(network, rows())), network)
    for got in ranks.run(on_rank, name, how):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
