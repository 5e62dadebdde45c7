"""The formulas of bench.scaling, counted: what three gloo processes send, compute and keep for the CLIP loss."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import Pool, ranks  # noqa: F401
from reference import normal
from torch import Tensor
from torch import distributed as dist
from torch.autograd.profiler import profile  # torch.profiler imports the compiler, which takes seconds
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import cross_entropy

import fastcl
from bench.scaling import formulas, times
from bench.scaling.formulas import METHODS, TORCH, TRITON, Cost, Pass, Setting
from bench.scaling.formulas import fastcl as ours
from fastcl import exchange
from fastcl.rowstats import meeting

ROOT = Path(__file__).resolve().parents[2]
S = Setting(samples=192, world=3, columns=16, bytes=4)
SCALE = 5.0
TWO_SLICES = S.samples * S.columns * S.bytes // 2


def clip(a: Tensor, b: Tensor) -> Tensor:
    return fastcl.clip_loss(a, b, SCALE, normalize=False, gather_distributed=True)


def gathers(local: bool, with_gradient: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The CLIP loss with stored logits, of gathered rows."""

    def everywhere(rows: Tensor) -> Tensor:
        if with_gradient:
            return torch.cat(all_gather(rows))
        parts = [torch.empty_like(rows) for _ in range(S.world)]
        dist.all_gather(parts, rows.detach())
        if not local:
            parts[dist.get_rank()] = rows
        return torch.cat(parts)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        whole_a, whole_b = everywhere(a), everywhere(b)
        if local:
            logits = SCALE * a @ whole_b.T, SCALE * b @ whole_a.T
            target = torch.arange(len(a)) + len(a) * dist.get_rank()
        else:
            logits = SCALE * whole_a @ whole_b.T
            logits, target = (logits, logits.T), torch.arange(len(whole_a))
        return (cross_entropy(logits[0], target) + cross_entropy(logits[1], target)) / 2

    return loss


class Ring(torch.autograd.Function):
    """Log-sum-exps of queries over the keys of all ranks, which go round; their gradients go round with them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        blocks, own = [], k
        for step in range(S.world):
            blocks.append((q @ k.T).logsumexp(1))
            k = passed_on(k) if step + 1 < S.world else k
        lse = torch.stack(blocks).logsumexp(0)
        ctx.save_for_backward(q, own, lse)
        return lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        q, k, lse = ctx.saved_tensors
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for step in range(S.world):
            # Two kernels, each of which computes the logits.
            dq += ((q @ k.T - lse[:, None]).exp() * grad[:, None]) @ k
            dk += ((q @ k.T - lse[:, None]).exp() * grad[:, None]).T @ q
            k = passed_on(k) if step + 1 < S.world else k
            dk = passed_on(dk)
        return dq, dk


def passed_on(rows: Tensor) -> Tensor:
    """What the rank before this one has."""
    rank, got = dist.get_rank(), torch.empty_like(rows)
    requests = [dist.isend(rows, (rank + 1) % S.world), dist.irecv(got, (rank - 1) % S.world)]
    for request in requests:
        request.wait()
    return got


def ring(a: Tensor, b: Tensor) -> Tensor:
    directions = [Ring.apply(SCALE * q, 1.0 * k) for q, k in ((a, b), (b, a))]
    return (sum(directions) / 2 - SCALE * (a * b).sum(1)).mean()


LOSSES = {
    "fastcl": clip,
    "Inf-CL's ring": ring,
    "open_clip, local_loss and gather_with_grad": gathers(True, True),
    "open_clip, gather_with_grad": gathers(False, True),
    "open_clip, local_loss": gathers(True, False),
    "open_clip, neither": gathers(False, False),
}


@contextmanager
def counted(found: list[tuple[int, int]]) -> Iterator[None]:
    """Append the bytes that this rank sends in a pass, if all-gathers are rings, and the operations of its products."""
    sent: list[int] = []
    others = S.world - 1

    def counts(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def wrapped(*given: Any, **more: Any) -> Any:
            sent.append(size(*given))
            return function(*given, **more)

        return wrapped

    sizes = {
        (exchange, "_started"): lambda v, _ranks: v.nbytes * others,
        (dist, "all_gather"): lambda _out, v: v.nbytes * others,
        (dist, "isend"): lambda v, _to: v.nbytes,
        # gloo's reduce-scatter: each rank sends pieces in turn, one of them to itself; the others have none.
        (dist, "scatter"): lambda _out, pieces, *_: sum(v.nbytes for v in (pieces or [])[1:]),
    }
    with pytest.MonkeyPatch.context() as patch, profile(record_shapes=True) as seen:
        for (module, name), size in sizes.items():
            patch.setattr(module, name, counts(getattr(module, name), size))
        yield
    operations = 0
    for event in seen.function_events:
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            (n, inner), (_, m) = event.input_shapes[1:3] if "add" in event.name else event.input_shapes[:2]
            operations += 2 * n * inner * m
    functional = [event.name for event in seen.function_events if event.name.startswith("_c10d_functional::all")]
    assert len(functional) in (0, len(sent))  # nothing is sent uncounted
    found.append((sum(sent), operations))


def measured(rank: int, name: str) -> tuple[list[tuple[int, int]], int, Tensor]:
    """(bytes, operations) of both passes; bytes kept between them; the averaged gradient of weights of all ranks."""
    mine, kept = slice(S.own * rank, S.own * (rank + 1)), {}
    towers = [v[mine].clone().requires_grad_() for v in rows()]
    passes: list[tuple[int, int]] = []

    def keep(v: Tensor) -> Tensor:
        kept[v.untyped_storage().data_ptr()] = 0 if any(v is tower for tower in towers) else v.nbytes
        return v

    with fastcl.backend("chunked"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v), counted(passes):
            loss = LOSSES[name](*towers)
        with counted(passes):
            loss.backward()
    least = S.own * S.columns * 4 * (1 if "ring" in name else 2)  # smaller ones are copies of own rows, and vectors
    gradient = sum(v[mine].T @ tower.grad for v, tower in zip(rows(), towers, strict=True))
    dist.all_reduce(gradient)
    return passes, sum(size for size in kept.values() if size >= least), gradient / S.world


def rows() -> Tensor:
    """Both towers' rows on all ranks, each tower with a mean of its own."""
    towers = [normal(S.samples, S.columns, seed=k) / 4 + normal(1, S.columns, seed=k + 5) / 3 for k in (0, 1)]
    return torch.stack(towers).float()


def exact() -> Tensor:
    """The weights' gradient of one process."""
    weights = torch.eye(S.columns, dtype=torch.float64, requires_grad=True)
    with fastcl.backend("dense"):
        fastcl.clip_loss(*(rows().double() @ weights), SCALE, normalize=False, gather_distributed=False).backward()
    return weights.grad


@pytest.mark.dist
@pytest.mark.parametrize("name", METHODS)
def test_bytes_operations_and_gradients_are_those_of_the_formulas(ranks: Pool, name: str) -> None:  # noqa: F811
    cost = ours(S, TORCH) if name == "fastcl" else METHODS[name].cost(S)
    want = exact()
    for passes, held, gradient in ranks.run(measured, name):
        assert passes == [(one.sent, one.operations) for one in (cost.forward, cost.backward)]
        assert held == cost.held
        gradient = gradient.double()
        match METHODS[name].gradient:
            case "exact":
                assert (gradient - want).norm() < 1e-5 * want.norm()
            case "1 / W of it":
                assert (S.world * gradient - want).norm() < 1e-5 * want.norm()
            case "another direction":
                assert torch.cosine_similarity(gradient.flatten(), want.flatten(), 0) < 0.99
            case other:
                raise AssertionError(other)


def sliced(rank: int) -> list[tuple[int, int]]:
    """(bytes, operations) of both passes, if the rows of a tower travel in two slices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "SLICE", TWO_SLICES)
        return measured(rank, "fastcl")[0]


@pytest.mark.dist
def test_rows_in_slices_travel_twice(ranks: Pool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(formulas, "SLICE", TWO_SLICES)
    cost = ours(S, TORCH)
    for passes in ranks.run(sliced):
        assert passes == [(one.sent, one.operations) for one in (cost.forward, cost.backward)]
    assert cost.held == 2 * TWO_SLICES and cost.forward.hides == 0


def test_the_working_copy_of_the_kernels_is_held() -> None:
    """Rows of other ranks that the Triton backend saves: as many bytes as the formula says."""
    s = Setting(samples=512, world=2, columns=64, bytes=2)
    x, y = normal(s.own, 64).half().requires_grad_(), normal(s.others, 64, seed=1).half()
    saved: dict[int, int] = {}

    def keep(v: Tensor) -> Tensor:
        saved[v.untyped_storage().data_ptr()] = v.nbytes if v.dtype == torch.float16 and v.ndim > 1 else 0
        return v

    with fastcl.backend("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        torch.ops.fastcl.fused_apart(x, y, None, None, None, 1.0, True, "fp16", False, False)
    # One tower: x and its working copy are its own, y and its working copy the other ranks'.
    assert sum(saved.values()) == ours(s).held // 2 * (1 + s.own // s.others)


def test_what_the_page_shows_is_what_is_computed() -> None:
    for s in (Setting(6_144, 3, 16, 4), Setting(65_536, 64, 512, 2)):
        letters = {"N": s.samples, "W": s.world, "D": s.columns, "b": s.bytes, "n": s.own}
        for name, method in METHODS.items():
            cost = method.cost(s)
            for text, value in (
                (method.sent, cost.sent),
                (method.held, cost.held),
                (method.operations, cost.operations),
            ):
                assert eval(text, {}, letters) == value, (name, text)
    whole, alone = Setting(4_096, 1), METHODS["fastcl"].cost(Setting(4_096, 1)).operations
    many = 1024 * METHODS["fastcl"].cost(Setting(2**20, 1024)).operations / 2**40
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert f"at most {alone / (many * whole.samples**2):.2f} W times as fast" in page
    assert "place of 8" in page and sum(TRITON) == 8 and f"{sum(TORCH)} n n D" in page
    assert "are more than 2 GiB" in page and formulas.SLICE == 2**31


@pytest.mark.parametrize("link", (times.NODE, times.NETWORK))
def test_a_gather_is_hidden_from_the_computed_number_on(link: times.Link) -> None:
    rate = times.Rates(2e-12, 3e-12)
    n = times.least_hidden(Setting(0, 8), link, rate)
    for own, hides in ((0.99 * n, False), (1.01 * n, True)):
        cost = ours(Setting(round(own) * 8, 8))
        words = formulas.WORDS * 7 / (1e6 * link.gathers)
        exposed = times.time_of(cost._replace(backward=Pass(0, 0, 0)), link.gathers, rate).seen
        assert (exposed <= words) == hides
    n = times.least_longer(Setting(0, 1), link, rate)
    for own, longer in ((0.99 * n, False), (1.01 * n, True)):
        s = Setting(round(own) * 64, 64)
        meets = ours(s, (0, 0))
        gather = 2 * s.others * s.columns * s.bytes / (1e6 * link.gathers)
        assert (times.time_of(meets, 1e9, rate).computing >= gather) == longer


def test_times_come_from_predictions(tmp_path: Path) -> None:
    (tmp_path / "static").mkdir()
    record = {"objective": "clip", "n": 65_536, "d": 512, "precision": "fp16"}
    found = [record | {"pass": "fwd", "predicted_ms": 2.0}, record | {"pass": "bwd", "predicted_ms": 8.0},
             record | {"pass": "bwd", "predicted_ms": 99.0, "kernel": "x"}]  # fmt: skip
    (tmp_path / "static" / "predicted-sm_90.json").write_text(json.dumps(found))
    rate = times.rates(tmp_path)
    one = times.time_of(ours(Setting(32_768, 1)), 450, rate)
    assert one.computing == pytest.approx(10.0) and one.sending == one.seen == 0
    cost = Cost(Pass(3_000_000, 10, 4), Pass(1_000_000, 20, 100), 0)
    assert times.time_of(cost, 1, times.Rates(0.5, 0.25)) == (10.0, 4.0, 1.0)
