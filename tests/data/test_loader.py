"""The loader: the same bits however they are made, shards that add up, workers that end."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from small_images import noise
from tiny_run import ROOT

from fastcl import FastclError
from fastcl.data import EvalViews, Split, TorchvisionRenderer, ViewLoader, ViewPlan, ViewSpec
from fastcl.data.deferred import held

CPU = torch.device("cpu")
PLAN = ViewPlan(ViewSpec.preset("cifar", size=8, blur=0.3), 2)
OTHER = ViewPlan(PLAN.spec, 3)


@pytest.fixture(scope="module")
def split():
    images = [noise(k, 6 + k % 5, 7 + k % 3) for k in range(26)]
    sizes = np.array([image.shape[:2] for image in images])
    return Split(np.arange(26) * 3 + 1, np.arange(26) % 4, sizes, lambda i: images[i])


class Elsewhere:
    """A renderer that is none of torchvision's, so that it runs in the loader's thread."""

    def __init__(self, split):
        self.split, self.spec, self.device = split, PLAN.spec, CPU
        self.inner, self.threads = TorchvisionRenderer(split, PLAN.spec, CPU), set()

    def __call__(self, positions, params):
        self.threads.add(threading.current_thread().name)
        return self.inner(positions, params)


class Streaming(Elsewhere):
    def stream(self, batches):
        ahead = []
        for batch in batches:
            ahead.append(self(*batch))
            if len(ahead) == 2:
                yield ahead.pop(0)
        yield from ahead


def same(got, wanted):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        assert torch.equal(a.labels, b.labels) and torch.equal(a.ids, b.ids)


@pytest.fixture(scope="module")
def wanted(split):
    """The batches of epoch 1, one image and one view at a time."""
    return list(ViewLoader(split, PLAN, 6, others=(OTHER,)).batches(1))


def test_a_batch_holds_the_views_labels_and_ids_of_its_samples(split, wanted):
    loader = ViewLoader(split, PLAN, 6, others=(OTHER,))
    assert len(wanted) == len(loader) == 4
    for step, batch in enumerate(wanted):
        positions = loader.batch(1, step)
        assert batch.ids.tolist() == split.ids[positions].tolist()
        assert batch.labels.tolist() == split.labels[positions].tolist()
        assert len(batch.views) == 4
        alone = [loader.views(positions[k : k + 1], 1) for k in range(6)]
        for view, whole in enumerate(batch.views):
            assert torch.equal(torch.cat([one[view] for one in alone]), whole)
        assert torch.equal(batch.views[2], ViewLoader(split, OTHER, 6).views(positions, 1)[0])


@pytest.mark.parametrize("workers, depth, threads", [(1, 1, 0), (2, 2, 0), (2, 1, 2), (0, 2, 3)])
def test_processes_threads_and_depth_change_no_bit(split, wanted, workers, depth, threads):
    renderer = TorchvisionRenderer(split, PLAN.spec, CPU, threads=threads)
    options = {"renderer": renderer, "others": (OTHER,), "workers": workers, "depth": depth}
    before = torch.get_rng_state()
    same(list(ViewLoader(split, PLAN, 6, **options).batches(1)), wanted)
    assert torch.equal(torch.get_rng_state(), before)
    views = EvalViews(split, PLAN, renderer, workers, depth)
    assert torch.equal(torch.cat(list(views.batches(7))), torch.cat(list(EvalViews(split, PLAN).batches(26))))


def test_what_does_not_belong_together_is_refused(split):
    turned = ViewPlan(dataclasses.replace(PLAN.spec, rotation=30.0), seed=5)
    with pytest.raises(FastclError, match="must have the same spec as the loader's plan"):
        ViewLoader(split, PLAN, 6, others=(turned,))
    with pytest.raises(FastclError, match="must have the same spec as the loader's plan"):
        ViewLoader(split, PLAN, 6, renderer=TorchvisionRenderer(split, turned.spec, CPU))
    with pytest.raises(FastclError, match="must have been made for the loader's split"):
        ViewLoader(split, PLAN, 6, renderer=TorchvisionRenderer(dataclasses.replace(split), PLAN.spec, CPU))


def test_the_order_that_is_handed_out_cannot_be_changed(split):
    with pytest.raises(ValueError, match="read-only"):
        ViewLoader(split, PLAN, 6).batch(0, 0).sort()


@pytest.mark.parametrize("kind", [Elsewhere, Streaming])
@pytest.mark.parametrize("depth", [1, 5])
def test_other_renderers_work_ahead_in_one_thread(split, wanted, kind, depth):
    renderer = kind(split)
    loader = ViewLoader(split, PLAN, 6, renderer=renderer, others=(OTHER,), workers=4, depth=depth)
    same(list(loader.batches(1)), wanted)
    assert len(renderer.threads) == 1 and threading.current_thread().name not in renderer.threads
    batches = loader.batches(1)
    same([next(batches)], wanted[:1])
    batches.close()
    assert not any(thread.name in renderer.threads for thread in threading.enumerate())


@pytest.mark.parametrize("order", ["shuffled", "balanced"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_share_the_batch_of_one(split, order, ranks):
    whole = list(ViewLoader(split, PLAN, 6, order).batches(1))
    shards = [list(ViewLoader(split, PLAN, 6, order, rank=r, world_size=ranks).batches(1)) for r in range(ranks)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
        for view in (0, 1):
            assert torch.equal(torch.cat([part.views[view] for part in parts]), batch.views[view])
    if order == "shuffled":
        seen = torch.cat([batch.ids for shard in shards for batch in shard])
        assert len(seen) == 24 and len(seen.unique()) == 24


def test_iteration_goes_on_from_any_state(split):
    loader = ViewLoader(split, PLAN, 6, workers=1)
    assert loader.state_dict() == {"epoch": 0, "position": 0}
    epochs = [list(loader), list(loader)]
    assert loader.state_dict() == {"epoch": 2, "position": 0}
    for epoch, position in ((0, 0), (0, 3), (1, 2)):
        again = ViewLoader(split, PLAN, 6)
        again.load_state_dict(json.loads(json.dumps({"epoch": epoch, "position": position})))
        same(list(again), epochs[epoch][position:])
    again.load_state_dict({"epoch": 0, "position": 1})
    for batch in again:
        same([batch], epochs[0][1:2])
        break
    assert again.state_dict() == {"epoch": 0, "position": 2}  # what was rendered ahead does not count
    for bad in ({"epoch": 0, "position": 4}, {"epoch": -1, "position": 0}):
        with pytest.raises(FastclError, match=rf"position in \[0, 4\), got {bad['epoch']} and {bad['position']}"):
            again.load_state_dict(bad)
    for bad, message in (
        ({"epoch": 0}, "state must have the keys epoch and position, got {"), (None, "got None"),
        ({"epoch": 0, "position": 1.5}, "position must be an integer, got 1.5"),
        ({"epoch": True, "position": 1}, "epoch must be an integer, got True"),
    ):  # fmt: skip
        with pytest.raises(FastclError, match=message):
            again.load_state_dict(bad)
    assert again.state_dict() == {"epoch": 0, "position": 2}


def test_batches_that_are_not_there(split):
    loader = ViewLoader(split, PLAN, 6)
    for start in (-1, 5):
        with pytest.raises(FastclError, match=rf"start must be in \[0, 4\] \(batches of an epoch\), got {start}"):
            next(loader.batches(0, start))
    for step in (-1, 4):
        with pytest.raises(FastclError, match=rf"step must be in \[0, 4\) .batches of an epoch., got {step}"):
            loader.batch(0, step)
    assert list(loader.batches(0, 4)) == []
    loader.batch(1, 0)
    for epoch, step in ((1.0, 0), (True, 0), (1, 0.5)):
        with pytest.raises(FastclError, match="must be an integer"):
            loader.batch(epoch, step)
    for positions in ([10**7], [0.5], [[0]], []):
        with pytest.raises(FastclError, match="positions"):
            loader.views(np.array(positions), 0)
    with pytest.raises(FastclError, match=r"positions must be in \[0, 26\), got 0 to 26"):
        next(EvalViews(split, PLAN).of([np.arange(27)]))
    with pytest.raises(FastclError, match="batch_size must be at least 1, got 0"):
        EvalViews(split, PLAN).batches(0)
    assert repr(split) == "Split(26 images)" and len(repr(loader)) < 2000


@pytest.mark.parametrize("options, message", [
    ({"world_size": 7}, "batch_size must be at least world_size, an image for each rank, got 6 and 7"),
    ({"rank": 2, "world_size": 2}, "rank must be in .*got 2 with world_size 2"),
    ({"workers": 1.5}, "workers must be an integer, got 1.5"), ({"rank": True}, "rank must be an integer, got True"),
    ({"workers": -1}, "data.workers.*got -1"), ({"depth": 0}, r"depth must be in \[1, 1000\], got 0"),
])  # fmt: skip
def test_options_that_cannot_be(split, options, message):
    with pytest.raises(FastclError, match=message):
        ViewLoader(split, PLAN, 6, **options)


def children():
    return {int(pid) for pid in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split()}


def test_processes_end_when_the_iterator_does(split):
    before = children()
    batches = ViewLoader(split, PLAN, 6, workers=2).batches(0)
    next(batches)
    assert len(children() - before) == 2
    batches.close()
    assert children() == before
    for _ in ViewLoader(split, PLAN, 6, workers=2):
        break
    gc.collect()
    assert children() == before

    def fail(i):
        raise FastclError(f"photos/{i}.jpg: truncated")

    broken = Split(split.ids, split.labels, split.sizes, fail)
    with pytest.raises(FastclError, match=r"^photos/\d+.jpg: truncated; corrupt=skip"):
        list(ViewLoader(broken, PLAN, 6, workers=2))
    assert children() == before


def test_a_worker_that_dies_is_one_clear_error(split):
    mortal = Split(split.ids, split.labels, split.sizes, lambda i: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(FastclError, match=r"one of the 1 worker processes \(data.workers\) died"):
        list(ViewLoader(mortal, PLAN, 6, workers=1))


def test_an_interrupt_while_processes_are_made_counts_afterwards():
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        reached = True
    assert reached and signal.getsignal(signal.SIGINT) is before


SCRIPT = """
import time
from fastcl.data import ViewLoader, ViewPlan, ViewSpec, load
loader = ViewLoader(load("digits").train, ViewPlan(ViewSpec.preset("characters"), 0), 64, workers=2)
for batch in loader:
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(blow):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    workers = [int(pid) for pid in open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()]
    assert len(workers) == 2
    os.killpg(process.pid, blow) if blow == signal.SIGINT else process.send_signal(blow)
    process.wait(timeout=30)
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    if blow == signal.SIGINT:
        assert process.stderr.read().count("KeyboardInterrupt") == 1


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
