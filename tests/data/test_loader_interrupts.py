"""Signals while a loader works ahead: each is answered, whenever it comes, and leaves no process behind."""

import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from gloo_ranks import NAME
from small_images import noise

from fastcl import FastclError
from fastcl.data import EvalViews, Split, TorchvisionRenderer, ViewLoader, ViewPlan, ViewSpec, limits
from fastcl.data.deferred import Closing, held
from fastcl.data.processes import Processes

PLAN = ViewPlan(ViewSpec.preset("cifar", size=8), 2)


def workers() -> list[multiprocessing.Process]:
    """Processes of loaders; those of other tests' ranks may be there too."""
    return [process for process in multiprocessing.active_children() if not process.name.startswith(NAME)]


@pytest.fixture
def split():
    images = [noise(k) for k in range(24)]
    sizes = np.array([image.shape[:2] for image in images])
    return Split(np.arange(24), np.arange(24) % 4, sizes, lambda i: images[i])


@pytest.fixture
def swallowed(monkeypatch):
    """What Python prints and forgets ("Exception ignored in ...")."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda told: found.append(repr(told.exc_value)))
    return found


@pytest.fixture
def while_closing(monkeypatch):
    """Presses Ctrl-C twice as worker processes end."""
    monkeypatch.setattr(Processes, "_end", pressing(Processes._end))


def pressing(end):
    def ends(self):
        crew = len(self._crew)
        end(self)
        if crew:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    return ends


class Elsewhere:
    """A renderer that is none of torchvision's, so that it runs in the loader's thread; its stream presses Ctrl-C as
    it is closed."""

    def __init__(self, split):
        self.inner = TorchvisionRenderer(split, PLAN.spec, "cpu")
        self.split, self.spec, self.device = split, PLAN.spec, self.inner.device

    def stream(self, batches):
        try:
            for positions, params in batches:
                yield self.inner(positions, params)
        finally:
            signal.raise_signal(signal.SIGINT)


def go_on():
    """Wait for an interrupt in a place where it can be raised."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        time.sleep(1e-3)


def leave(loader):
    for _ in loader:
        break
    go_on()


def finish(loader):
    for _ in loader:
        pass


def take_all(loader):
    batches = loader.batches(0)
    for _ in range(len(loader)):
        next(batches)
    batches.close()


def fail(loader):
    for _ in loader:
        raise OSError("the loop's own")


@pytest.mark.parametrize("use", [leave, finish, take_all, fail])
@pytest.mark.parametrize("where", ["processes", "thread"])
def test_an_interrupt_while_the_workers_end_is_raised(split, while_closing, swallowed, use, where):
    before = signal.getsignal(signal.SIGINT), threading.active_count()
    renderer = Elsewhere(split) if where == "thread" else None
    loader = ViewLoader(split, PLAN, 6, workers=1, renderer=renderer)
    with pytest.raises(KeyboardInterrupt):
        try:
            use(loader)
        except OSError:  # the loop's own goes on; the interrupt follows
            go_on()
    assert not swallowed and not workers()
    assert signal.getsignal(signal.SIGINT) is before[0]
    end = time.monotonic() + 10
    while threading.active_count() > before[1] and time.monotonic() < end:  # the thread that sent it again
        time.sleep(1e-3)
    assert threading.active_count() == before[1]


def test_evaluation_views_too(split, while_closing, swallowed):
    class Batches:
        def __iter__(self):
            return EvalViews(split, PLAN, workers=1).batches(7)

    with pytest.raises(KeyboardInterrupt):
        leave(Batches())
    assert not swallowed and not workers()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_that_python_answers_are_held_and_others_are_not_touched(number):
    seen, before = [], signal.signal(number, lambda n, _: seen.append(n))
    try:
        with held():
            signal.raise_signal(number)
            assert not seen
        assert seen == [number]
        signal.signal(number, signal.SIG_IGN)
        with held():
            assert signal.getsignal(number) is signal.SIG_IGN
            signal.raise_signal(number)
        assert seen == [number]
    finally:
        signal.signal(number, before)


def test_nothing_is_held_in_another_thread(split):
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        with held():
            found.append(signal.getsignal(signal.SIGINT))
        found.append(len(list(ViewLoader(split, PLAN, 6, workers=1))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, 4]


def test_a_generator_that_is_done_is_not_closed_again():
    calls = []

    def two():
        try:
            yield from (1, 2)
        finally:
            calls.append("closed")

    results = Closing(two())
    assert list(results) == [1, 2]
    results.close()
    del results
    assert calls == ["closed"]


def test_a_worker_killed_at_its_first_batch(split):
    """From outside, while it renders: the error comes where the batch is asked for, and nowhere else."""
    started = multiprocessing.get_context("fork").Event()

    def read(i):
        started.set()
        time.sleep(60)

    def kill():
        started.wait(30)
        for process in workers():
            process.kill()

    slow = Split(split.ids, split.labels, split.sizes, read)
    batches = ViewLoader(slow, PLAN, 6, workers=2).batches(0)
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(FastclError, match=r"one of the 2 worker processes \(data.workers\) died: .*SIGKILL"):
        next(batches)
    killer.join()
    assert not workers()


def test_a_worker_killed_between_batches_is_no_error_of_the_code_between(split):
    batches = ViewLoader(split, PLAN, 6, workers=1, depth=1).batches(0)
    next(batches)
    (worker,) = workers()
    worker.kill()
    worker.join()
    time.sleep(0.01)  # where torch's DataLoader would raise
    with pytest.raises(FastclError, match="worker processes .* died"):
        list(batches)


def test_workers_in_a_daemonic_process(split):
    ours, theirs = multiprocessing.Pipe()

    def work():
        try:
            list(ViewLoader(split, PLAN, 6, workers=1))
        except Exception as error:
            theirs.send(f"{type(error).__name__}: {error}")

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    assert ours.poll(20)
    assert ours.recv().startswith("FastclError: data.workers must be 0 in a daemonic process")
    process.join()


def test_processes_that_cannot_be_started(split, monkeypatch):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(FastclError, match="data.workers: cannot start process 1 of 2 .*temporarily unavailable"):
        next(ViewLoader(split, PLAN, 6, workers=2).batches(0))


class TestLimits:
    @pytest.fixture(autouse=True)
    def four_cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        limits._warn.cache_clear()

    @pytest.mark.parametrize("workers", [65, 10**6])
    def test_more_than_sixteen_a_core_are_refused(self, split, workers):
        for refused in (
            lambda: ViewLoader(split, PLAN, 6, workers=workers),
            lambda: EvalViews(split, PLAN, None, workers),
        ):
            with pytest.raises(FastclError, match=rf"data.workers must be in \[0, 64\] on 4 cores, got {workers}"):
                refused()
        with pytest.raises(FastclError, match=rf"threads must be in \[0, 64\] on 4 cores, got {workers}"):
            TorchvisionRenderer(split, PLAN.spec, "cpu", threads=workers)
        with pytest.raises(FastclError, match=r"depth must be in \[1, 1000\], got 1001"):
            ViewLoader(split, PLAN, 6, depth=1001)

    @pytest.mark.parametrize(("workers", "ranks", "local", "warned"), [
        (4, 1, None, False), (5, 1, None, True), (2, 2, None, False), (3, 2, None, True), (3, 2, "1", False),
        (2, 6, "2", False), (3, 1, "2", True), (64, 1, None, True),
    ])  # fmt: skip
    def test_more_than_the_cores_of_a_rank_are_warned_of_once(
        self, split, caplog, monkeypatch, workers, ranks, local, warned
    ):
        if local:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        for _ in range(2):
            ViewLoader(split, PLAN, 6, workers=workers, world_size=ranks)
        assert caplog.text.count(f"data.workers is {workers}, more than the") == warned
