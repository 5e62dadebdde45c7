"""Runs whose batches several processes share: the values of one process, the same bytes again, and one end for all."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from test_micro import batch, distance, embedding, gradients, network, whole
from tiny_run import results, tiny_toml
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from warm_commands import end_ranks, run, run_ranks, start_ranks

import fastcl

pytestmark = pytest.mark.dist
SETTINGS = [
    "data.classes=2", 'train.models=["dcl", "ce"]', 'train.controls=["identity"]', "train.batch_size=96",
    "train.epochs=2", "model.options={layers=[1, 1, 1, 1], channels=[4, 4, 8, 8], drop_rate=0.0}", "train.timeout=60",
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Function from a folder and changed settings to the arguments of a run."""
    config = tiny_toml(tmp_path_factory.mktemp("config") / "tiny.toml")

    def of(out, *changes):
        options = [word for item in (*SETTINGS, *changes) for word in ("--set", item)]
        return ["train", config, "--out", out, *options]

    return of


@pytest.fixture(scope="module")
def three(arguments, tmp_path_factory):
    """Folder of a run of three ranks."""
    out = tmp_path_factory.mktemp("three") / "run"
    statuses, said = run_ranks(3, *arguments(out), output=out.parent / "log")
    assert statuses == [0, 0, 0], said
    assert "report: " in said[0] and said[1:] == ["", ""]
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == (pytest.approx(b[key], **tolerance) if isinstance(value, float) else b[key]), key


def waited_for(path, pattern, ranks):
    """Wait until ranks have written a file."""
    while not list(path.glob(pattern)):
        assert all(process.is_alive() for process in ranks)
        time.sleep(0.01)


def test_three_ranks_train_as_one_process_does_in_three_parts(three, arguments, tmp_path):
    """Each rank normalises its own part of the batch, as the parts of `train.micro_batch` do."""
    status, said = run("train", *arguments(tmp_path / "one", "train.micro_batch=32")[1:], output=tmp_path / "log")
    assert status == 0, said
    for name in ("steps.jsonl", "pairs.jsonl"):
        for a, b in zip(*(lines(folder / name) for folder in (three, tmp_path / "one")), strict=True):
            close(a, b, rel=1e-2, abs=1e-3)
            if a["step"] == 0:
                close(a, b, rel=1e-5, abs=1e-5)
    weights = [load_file(folder / "weights" / "ce.safetensors") for folder in (three, tmp_path / "one")]
    trained = [name for name in weights[0] if "running" not in name and "num_batches" not in name]
    assert len(trained) > 20
    for name in trained:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-2, atol=1e-3)
    first = [
        [row for row in lines(folder / "metrics.jsonl") if not row["epoch"]] for folder in (three, tmp_path / "one")
    ]
    for a, b in zip(*first, strict=True):  # equal weights: features to the bit, sums in another order
        close(a, b, rel=1e-9, abs=0)
        assert a == b or "pair" in a
    assert "x 3 ranks" in json.loads((three / "run.json").read_text())["device"]


def test_parts_of_ranks_are_parts_of_the_batch(arguments, tmp_path):
    """Two ranks with two parts each train as one process with four."""
    changes = "train.micro_batch=24", "train.epochs=1", 'train.models=["nscl", "ce"]', "train.controls=[]"
    statuses, said = run_ranks(2, *arguments(tmp_path / "two", *changes), output=tmp_path / "log")
    assert statuses == [0, 0], said
    status, said = run("train", *arguments(tmp_path / "one", *changes)[1:], output=tmp_path / "log.one")
    assert status == 0, said
    for a, b in zip(*(lines(tmp_path / name / "steps.jsonl") for name in ("two", "one")), strict=True):
        close(a, b, rel=1e-3, abs=1e-4)


def test_the_identity_twin_stays_one(three):
    a, b = (load_file(three / "weights" / f"{name}.safetensors") for name in ("dcl", "identity"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    pairs = [row for row in lines(three / "metrics.jsonl") if row.get("pair") == ["dcl", "identity"]]
    assert [(row["cka_debiased"], row["weight_gap"]) for row in pairs] == [(1, 0)] * 3


def test_an_evaluation_is_of_the_networks_that_are_saved(three):
    """Their running statistics differ from rank to rank within an epoch."""
    (last,) = [row for row in lines(three / "metrics.jsonl") if row["epoch"] == 2 and row.get("pair") == ["dcl", "ce"]]
    dcl, ce = (load_file(three / "features" / f"{name}.safetensors")["features"] for name in ("dcl", "ce"))
    assert last["cka"] == pytest.approx(fastcl.linear_cka(dcl, ce), rel=1e-6)
    assert last["cka_debiased"] == pytest.approx(fastcl.linear_cka(dcl, ce, debiased=True), rel=1e-6)


@pytest.mark.parametrize("world", [3, 2])
def test_a_killed_rank_ends_the_run_which_resumes_at_any_world_size(three, arguments, tmp_path, world):
    out = tmp_path / "run"
    ranks = start_ranks(3, *arguments(out), output=tmp_path / "log")
    waited_for(out / "checkpoints", "epoch_000001-*.pt", ranks)
    ranks[1].kill()
    statuses, said = end_ranks(ranks, tmp_path / "log")
    assert statuses == [1, -signal.SIGKILL, 1], said
    text = "".join(said)
    assert text.count("error: ") == text.count("error: rank 1 of 3 no longer answers: killed") == 1, said
    assert "Traceback" not in text
    statuses, said = run_ranks(world, *arguments(out), output=tmp_path / "log")
    assert statuses == [0] * world and "resuming from" in said[0], said
    if world == 3:
        assert results(out) == results(three)
    else:
        assert "resuming a run made elsewhere" in said[0] and results(out) != results(three)
        steps = results(out)["steps.jsonl"].splitlines(), results(three)["steps.jsonl"].splitlines()
        assert (
            len(steps[0]) == len(steps[1]) and steps[0][:6] == steps[1][:6] != steps[1][6:]
        )  # the first epoch: two steps, three models


def test_a_finished_run_is_left_as_it_is_by_any_number_of_ranks(three, arguments, tmp_path):
    before = results(three)
    for world in (1, 2):
        statuses, said = run_ranks(world, *arguments(three), output=tmp_path / "log")
        assert statuses == [0] * world and said[0].count("already finished: 2 epochs") == 1
        assert results(three) == before


def test_a_rank_that_stands_still_is_named(arguments, tmp_path):
    ranks = start_ranks(3, *arguments(tmp_path / "run", "train.timeout=3", "train.epochs=50"), output=tmp_path / "log")
    try:
        waited_for(tmp_path / "run" / "checkpoints", "epoch_000001-*.pt", ranks)
        os.kill(ranks[0].pid, signal.SIGSTOP)
        for process in ranks[1:]:
            process.join(60)
    finally:
        ranks[0].kill()
    statuses, said = end_ranks(ranks, tmp_path / "log")
    assert statuses[1:] == [1, 1], said
    text = said[1] + said[2]
    assert text.count("error: ") == text.count("error: rank 0 of 3 no longer answers: ") == 1
    assert "at a standstill for longer than train.timeout = 3 s" in text


@pytest.mark.parametrize(("changes", "message"), [
    (["train.batch_size=2"], "train.batch_size must be at least world_size, an image for each rank, got 2 and 3"),
    (["optim.lr=1e30"], "of model 'dcl' is nan at step"),
    (["train.epoch=3"], "unknown key 'train.epoch'"),
])  # fmt: skip
def test_an_error_ends_all_ranks_with_one_message(arguments, tmp_path, changes, message):
    statuses, said = run_ranks(3, *arguments(tmp_path / "run", *changes), output=tmp_path / "log")
    assert statuses == [1, 1, 1] and said[0].count("error: ") == 1 and message in said[0], said
    assert said[1:] == ["", ""]


def test_an_error_of_one_rank_ends_all(arguments, tmp_path):
    """A locked folder is seen by the first rank alone, other settings by the last."""
    from fastcl.train.run_folder.records import locked

    with locked(tmp_path / "run"):
        statuses, said = run_ranks(2, *arguments(tmp_path / "run"), output=tmp_path / "log")
    assert statuses == [1, 1] and f"error: another process is training in {tmp_path / 'run'}" in said[0], said
    assert said[1] == ""


@pytest.mark.parametrize(("images", "failing"), [(3, [0]), (2, [0, 1])])
def test_an_error_that_nobody_expects_ends_all_with_its_cause(arguments, tmp_path, images, failing):
    """Batch normalisation refuses one row: the first of two ranks has one image of three, both have one of two."""
    changes = f"train.batch_size={images}", "train.joint_views=false"
    statuses, said = run_ranks(2, *arguments(tmp_path / "run", *changes), output=tmp_path / "log")
    assert statuses == [1, 1] and "Traceback" not in "".join(said), said
    lines = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    why = "error: rank {} of 2 has failed: ValueError: Expected more than 1 value per channel"
    (spoke,) = [k for k in range(2) if (tmp_path / "log" / f"{k}.json").exists()]
    assert spoke in failing and all(line.startswith(why.format(spoke)) for line in lines), said
    assert len(lines) == (1 if len(failing) == 2 else 2), said
    told = json.loads((tmp_path / "log" / f"{spoke}.json").read_text())["message"]["extraInfo"]
    assert "in embed" in told["py_callstack"]  # the traceback, which torchrun shows


UNEVEN = (9, 6, 7)  # samples of each rank


class Tempered(torch.nn.Module):
    """A network that holds the temperature of its loss."""

    def __init__(self):
        super().__init__()
        self.network = network(torch.nn.BatchNorm1d)
        self.temperature = torch.nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x):
        return self.network(x)


def ddp_step(rank, folder):
    """In a process of its own: the gradients of a second step like the first, in parts of four samples."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=len(UNEVEN))
    mine, labels = own_parts(rank)
    net = DistributedDataParallel(Tempered())
    for _ in range(2):
        net.zero_grad()
        value = fastcl.micro_step(
            embedding(net), mine,
            lambda a, b: fastcl.nscl_loss(a, b, labels, net.module.temperature, gather_distributed=True), network=net,
        )  # fmt: skip
    torch.save((value, gradients(net)), folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def own_parts(rank):
    first, second, labels = (rows.split(UNEVEN)[rank] for rows in batch())
    return list(zip(first.split(4), second.split(4), strict=True)), labels


def test_micro_step_over_uneven_ranks_is_one_graph_over_all_parts(tmp_path):
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=ddp_step, args=(rank, tmp_path)) for rank in range(len(UNEVEN))]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    one = Tempered()
    parts = [part for rank in range(len(UNEVEN)) for part in own_parts(rank)[0]]
    expected = whole(one, parts, lambda a, b: fastcl.nscl_loss(a, b, batch()[2], one.temperature))
    found = [torch.load(tmp_path / str(rank)) for rank in range(len(UNEVEN))]
    assert sum(value for value, _ in found).item() / len(UNEVEN) == pytest.approx(expected.item(), rel=1e-12)
    for _, gradient in found:
        assert distance(gradient, gradients(one)) < 1e-12
        assert gradient[0].item() == pytest.approx(one.temperature.grad.item(), rel=1e-12)
