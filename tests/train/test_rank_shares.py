"""What one rank of several takes: its part of the same batches, its images of an evaluation, its workers and seeds."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gloo_ranks import groups, ranks  # noqa: F401
from tiny_run import tiny_config
from torch import distributed as dist

from fastcl.errors import FastclError, ToldElsewhere
from fastcl.similarity import PairAccumulator
from fastcl.train import trainer
from fastcl.train.group import ALONE, Ranks, average_gradients
from fastcl.train.inputs import open_inputs
from fastcl.train.measures import evaluate
from fastcl.train.models import Twin, make_optimizer, make_twins
from fastcl.train.step import fetch, step_twins

CPU = torch.device("cpu")


class Told(Ranks):
    """A rank without others: it keeps what it would send."""

    @contextmanager
    def together(self):
        yield

    def rows_of_all(self, rows, device):
        return rows


def test_the_ranks_see_the_batches_of_one_process(tmp_path):
    config = tiny_config(train__batch_size=31, train__controls=["reseeded"])
    one = open_inputs(config, tmp_path, CPU).loader
    parts = [open_inputs(config, tmp_path, CPU, Ranks(rank, 3)).loader for rank in range(3)]
    for whole, *shares in zip(one.batches(1), *(part.batches(1) for part in parts), strict=True):
        assert [len(share.ids) for share in shares] == [10, 10, 11] and len(whole.views) == 4
        assert torch.equal(torch.cat([share.ids for share in shares]), whole.ids)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        for k, view in enumerate(whole.views):
            assert torch.equal(torch.cat([share.views[k] for share in shares]), view)


UNEVEN = (3, 3, 4)  # images of each rank


def two_steps(rank, *micro):
    """The tables of two steps of this rank on its part of a batch, and how far each model's weights move; rank None: of
    one process on all of it. No layer normalises over a batch."""
    torch.use_deterministic_algorithms(True)
    config = tiny_config(train__models=["nscl", "supcon", "ce"], train__controls=["identity", "reseeded"])
    twins = make_twins(config, 1, 3, CPU)
    for twin in twins:
        for module in list(twin.network.modules()):
            for name, child in module.named_children():
                if isinstance(child, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                    setattr(module, name, torch.nn.Identity())
        twin.optimizer = make_optimizer(twin.network, config.optim)
    among = ALONE if rank is None else Ranks(rank, 3, groups["all"])
    own, tables, numbers = slice(None), [], torch.Generator().manual_seed(5)
    if rank is not None:
        own = slice(sum(UNEVEN[:rank]), sum(UNEVEN[: rank + 1]))
    before = [torch.nn.utils.parameters_to_vector(twin.network.parameters()) for twin in twins]
    for k in range(2):
        views, others = ([torch.randn(10, 1, 8, 8, generator=numbers)[own] for _ in range(2)] for _ in range(2))
        labels = torch.randint(0, 3, (10,), generator=numbers)[own]
        options = {"micro_batch": micro[0] if micro else None, "ranks": among, "total": 10}
        tables.append(step_twins(twins, views, others, labels, temperature=0.5, lr=0.1, seed=k, **options))
    after = [torch.nn.utils.parameters_to_vector(twin.network.parameters()) for twin in twins]
    moved = [(b - a).detach() for a, b in zip(before, after, strict=True)]
    return moved, [(table.values, table.rows, table.pair()) for table in fetch(tables)]


@pytest.mark.dist
def test_parts_that_are_not_equal_count_by_their_images(ranks):  # noqa: F811
    """The third rank runs two parts, 3 images and 1, where the others run one."""
    moved, tables = two_steps(None)
    for rank, (found, noted) in enumerate(ranks.run(two_steps, 3)):
        for got, want in zip(found, moved, strict=True):
            assert (got - want).norm() <= 1e-4 * want.norm(), rank
        assert torch.equal(found[0], found[3])  # the identity twin
        for (values, rows, pair), (wanted, total, same) in zip(noted, tables, strict=True):
            assert rows == total == 20 and pair == pytest.approx(same, rel=1e-3, abs=1e-5)
            assert values == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def exchanged(rank):
    """What a step of three models does, in order: embeddings, and all-reduces with their numbers of elements."""
    twins, done = make_twins(tiny_config(train__models=["nscl", "supcon", "ce"], train__controls=[]), 1, 3, CPU), []
    all_reduce, embed = dist.all_reduce, Twin.embed

    def noted(tensor, *given, async_op=False, **more):
        done.append((tensor.numel(), async_op))
        work = all_reduce(tensor, *given, async_op=async_op, **more)
        return SimpleNamespace(wait=lambda: (done.append((tensor.numel(), "arrived")), work.wait())) if work else work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        patch.setattr(Twin, "embed", lambda twin, views: (done.append(twin.name), embed(twin, views))[1])
        views, labels = (torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8)), torch.arange(4) % 3
        step_twins(twins, views, None, labels, temperature=0.5, lr=0.1, seed=0, ranks=Ranks(rank, 3, groups["all"]))
    learning = ([p for p in twin.network.parameters() if p.grad is not None] for twin in twins)
    return done, [sum(p.numel() for p in found) for found in learning]


@pytest.mark.dist
def test_a_network_is_one_all_reduce_that_travels_while_the_next_one_runs(ranks):  # noqa: F811
    for done, (a, b, c) in ranks.run(exchanged):
        sent = ["nscl", "supcon", (a, True), (b, True), "ce", (a, "arrived"), (b, "arrived"), (c, True), (c, "arrived")]
        assert done[:-1] == sent and done[-1][1] is False and done[-1][0] < 20  # the table of what was measured


def checkpointed(rank):
    """What the buffers of a rank hold when the run is saved."""
    network = torch.nn.BatchNorm1d(2)
    network.running_mean.fill_(rank)
    run = SimpleNamespace(
        twins=[SimpleNamespace(network=network)], ranks=Ranks(rank, 3, groups["all"]), out=Path("run"), epoch=1,
        log=SimpleNamespace(files={}), _describe=dict,
    )  # fmt: skip
    held = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "identity", dict)
        patch.setattr(trainer, "save_checkpoint", lambda *_: held.append(network.running_mean.tolist()))
        trainer.Lockstep._checkpoint(run)
    return held, network.running_mean.tolist()


@pytest.mark.dist
def test_a_checkpoint_has_the_running_statistics_of_all_ranks(ranks):  # noqa: F811
    mean = [1.0, 1.0]
    assert ranks.run(checkpointed) == [([mean], mean), ([], mean), ([], mean)]


@pytest.mark.parametrize("size", [2, 3, 9])
def test_the_ranks_encode_the_batches_of_one_process(tmp_path, monkeypatch, size):
    monkeypatch.setattr(evaluate, "EVAL_BATCH", 20)
    config = tiny_config(train__models=["dcl", "nscl"], train__controls=[])
    twins = make_twins(config, 1, 3, CPU)
    views = open_inputs(config, tmp_path, CPU).test
    expected, whole = evaluate.encode(twins, views), PairAccumulator(["dcl", "nscl"])
    shares = []
    for rank in range(size):
        accumulator = PairAccumulator(["dcl", "nscl"])
        shares.append(evaluate.encode(twins, views, accumulator, Told(rank, size)))
        whole.merge(accumulator)
    assert whole.n == len(views.split) > 5 * 20
    for name, features in expected.items():
        assert torch.equal(torch.cat([share[name] for share in shares if share[name] is not None]), features)


@pytest.mark.parametrize(("given", "local", "expected"), [
    (None, 4, 0), (0, 4, 0), (8, 4, 2), (7, 4, 1), (3, 4, 1), (3, 1, 3),
])  # fmt: skip
def test_workers_are_divided(tmp_path, monkeypatch, given, local, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    config = tiny_config(data__workers=given) if given is not None else tiny_config()
    assert open_inputs(config, tmp_path, CPU, Ranks(0, 4)).loader.workers == expected
    assert open_inputs(config, tmp_path, CPU).loader.workers == (given or 0)


def test_a_rank_has_its_own_seeds_and_the_first_those_of_one_process():
    seeds = [[Ranks(rank, 3).seed(step) for step in range(50)] for rank in range(3)]
    assert seeds[0] == [ALONE.seed(step) for step in range(50)] == list(range(50))
    assert len({seed for row in seeds for seed in row}) == 150
    for row in seeds:
        torch.manual_seed(row[-1])  # 64 bits


def test_one_process_exchanges_nothing_and_the_first_rank_speaks():
    network = torch.nn.Linear(2, 2)
    network(torch.ones(1, 2)).sum().backward()
    before = network.weight.grad.clone()
    average_gradients(network, ALONE)()
    assert torch.equal(network.weight.grad, before)
    assert ALONE.gathered(3) == [3] and ALONE.from_first(3) == 3 and ALONE.within(1.0) is ALONE
    assert not isinstance(Ranks(0, 2).error("x"), ToldElsewhere) and isinstance(Ranks(1, 2).error("x"), ToldElsewhere)


@pytest.mark.parametrize("within_a_loss", [False, True])
def test_an_exchange_that_fails_is_a_rank_that_no_longer_answers(within_a_loss):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    with (
        pytest.raises(FastclError, match="of 3 no longer answers.*train.timeout = 5 s"),
        Ranks(1, 3, None, 5.0).watched(),
    ):
        if not within_a_loss:
            raise lost
        raise FastclError("rank 1 of 3 waited in vain") from lost
    with pytest.raises(FastclError, match="^other$"), Ranks(1, 3, None, 5.0).watched():
        raise FastclError("other") from KeyError()
