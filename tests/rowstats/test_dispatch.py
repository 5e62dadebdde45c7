"""Which backend runs: the state of threads and contexts, compiled code, checkpoints, transforms, a missing Triton."""

import asyncio
import subprocess
import sys
import threading
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastcl
from fastcl import FastclError, dispatch
from fastcl.dispatch import current_backend, last_backend

ROOT = Path(__file__).resolve().parents[2]
Z = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32))
SAMPLE, LABELS = torch.arange(8) // 2, torch.arange(8) // 2 % 2


def loss(z: torch.Tensor, temperature: float | torch.Tensor = 0.2) -> torch.Tensor:
    return fastcl.contrastive_loss(z.tanh(), SAMPLE, LABELS, "supcon", temperature)


def test_two_threads_inside_different_backends_end_in_any_order():
    steps, seen = threading.Barrier(2, timeout=60), {}

    def run(name: str, first: bool) -> None:
        seen[name] = [current_backend(), last_backend()]
        block = fastcl.backend(name)
        for turn in (True, False):  # enters second, leaves second; the other way round
            if first == turn:
                block.__enter__()
            steps.wait()
        loss(Z)
        seen[name] += [current_backend(), last_backend()]
        steps.wait()
        for turn in (True, False):
            if first == turn:
                block.__exit__(None, None, None)
            steps.wait()
        seen[name] += [current_backend(), last_backend()]

    with fastcl.backend("chunked"):
        loss(Z)
        threads = [threading.Thread(target=run, args=arguments) for arguments in (("dense", True), ("chunked", False))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_backend() == last_backend() == "chunked"
    for name in ("dense", "chunked"):
        assert seen[name] == ["auto", "none", name, name, "auto", name]


def test_tasks_and_contexts_have_a_state_each():
    async def task(name: str, ready: asyncio.Event, other: asyncio.Event) -> list[str]:
        with fastcl.backend(name):
            loss(Z)
            ready.set()
            await other.wait()
            return [current_backend(), last_backend()]

    async def both() -> list[list[str]]:
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task("dense", a, b), task("chunked", b, a))

    assert asyncio.run(both()) == [["dense", "dense"], ["chunked", "chunked"]]
    block = fastcl.backend("dense")
    copy_context().run(block.__enter__)
    assert current_backend() == "auto"
    block.__exit__(None, None, None)  # in another context than it began in, as generators may
    assert current_backend() == "auto"


def test_blocks_of_generators_may_end_before_the_blocks_inside_them():
    def inside(name: str):
        with fastcl.backend(name):
            yield

    first, second = inside("dense"), inside("chunked")
    next(first), next(second)
    assert current_backend() == "chunked"
    first.close()
    assert current_backend() == "chunked"
    second.close()
    assert current_backend() == "auto"


def test_one_object_serves_several_blocks():
    block = fastcl.backend("dense")
    for _ in range(2):
        with block:
            with fastcl.backend("chunked"), block:
                assert current_backend() == "dense"
            assert current_backend() == "dense"
        assert current_backend() == "auto"


@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiled_code_follows_the_block_around_it_and_blocks_inside(engine):
    z = Z.clone()

    def inside(z: torch.Tensor) -> torch.Tensor:
        with fastcl.backend("dense"):
            value = fastcl.ntxent_loss(z, z.flip(0))
        return value + fastcl.ntxent_loss(z, z.flip(0))

    around = torch.compile(lambda z: fastcl.ntxent_loss(z, z.flip(0)), fullgraph=True, backend=engine)
    for name in ("dense", "auto") if engine == "inductor" else ("dense", "chunked", "dense", "auto"):
        with fastcl.backend(name):
            expected, ran = fastcl.ntxent_loss(z, z.flip(0)), last_backend()
            fastcl.dispatch.ran_on("none")
            torch.testing.assert_close(around(z), expected)
            assert last_backend() == ran
    if engine == "inductor":
        return
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend=engine)(z), inside(z))
    assert current_backend() == "auto" and last_backend() == "chunked"
    seen = []
    with fastcl.backend("dense"):
        thread = threading.Thread(target=lambda: (around(z), seen.append(last_backend())))
        thread.start()
        thread.join()
        assert seen == ["chunked"] and last_backend() == "chunked"  # of this thread, from before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["dense", "chunked", "triton"])
def test_a_checkpoint_repeats_its_forward_pass_on_the_same_backend(name, reentrant):
    if not reentrant and dispatch._saved_tensors_hooks is None:
        pytest.skip("this PyTorch does not tell which checkpoint a forward pass belongs to")

    def nested(z: torch.Tensor) -> torch.Tensor:
        with fastcl.backend("dense"):
            value = loss(z)
        return value + checkpoint(loss, 2 * z, use_reentrant=reentrant) + loss(3 * z)

    for function in (loss,) if name == "triton" or reentrant else (loss, nested):
        gradients = []
        for repeated in (False, True):
            z = Z.clone().requires_grad_()
            with fastcl.backend(name):
                value = checkpoint(function, z, use_reentrant=reentrant) if repeated else function(z)
            if not reentrant:
                value.backward(retain_graph=True)
                z.grad = None
            value.backward()
            gradients.append(z.grad)
        # Reentrant, it cannot be told what ran: the gradient is that of the backend of the backward pass.
        torch.testing.assert_close(*gradients, **({} if reentrant else {"rtol": 0, "atol": 0}))
    direct, repeated = Z.clone().requires_grad_(), Z.clone().requires_grad_()
    with_backend = fastcl.backend(name)(loss)
    with_backend(direct).backward()
    checkpoint(with_backend, repeated, use_reentrant=reentrant).backward()
    assert torch.equal(repeated.grad, direct.grad) and last_backend() == name


def test_last_backend_tells_of_every_operation():
    operations = {
        "row_stats": lambda: fastcl.row_stats(Z, sample=SAMPLE, temperature=0.3),
        "own objective": lambda: fastcl.contrastive_loss(Z, SAMPLE, LABELS, lambda s: s.lse_other),
        "twin_stats": lambda: fastcl.twin_stats(Z, Z + 1, SAMPLE, temperature=0.3),
        "features": lambda: fastcl.pair_stats(Z, Z.square(), route="features"),
        "tiles": lambda: fastcl.pair_stats(Z, Z.square(), "rbf"),
        "accumulator": lambda: fastcl.PairAccumulator(("a", "b")).update({"a": Z, "b": Z}),
    }
    for operation in operations.values():
        for name in ("dense", "chunked", "triton"):
            with fastcl.backend(name):
                operation()
                assert last_backend() == name
    far = torch.cat([Z, 1e3 * Z])  # an outlier, for which the kernels' float32 would not do
    with fastcl.backend("triton"):
        fastcl.pair_stats(far, far, "rbf", bandwidth=0.01)
        assert last_backend() == "chunked"
        fastcl.dispatch.ran_on("none")
        fastcl.spearman_rsa(Z, Z.square())  # has no kernels
        assert last_backend() == "chunked"


@pytest.mark.parametrize("name", ["chunked", "triton"])
def test_transforms_of_torch_func(name):
    temperatures = torch.tensor([0.1, 0.2])
    with fastcl.backend("dense"):
        expected = torch.func.vmap(lambda t: loss(Z, t))(temperatures)
        torch.testing.assert_close(torch.stack([loss(Z, 0.1), loss(Z, 0.2)]), expected)
        torch.func.jacrev(torch.func.grad(loss))(Z)
        torch.func.vmap(lambda labels: fastcl.contrastive_loss(Z, SAMPLE, labels, "nscl"))(LABELS.repeat(2, 1))
    with fastcl.backend(name):
        torch.testing.assert_close(torch.func.vmap(lambda t: loss(Z, t))(temperatures), expected, rtol=1e-3, atol=0)
        for transformed in (
            lambda: torch.func.grad(loss)(Z),
            lambda: torch.func.jacrev(loss)(Z),
            lambda: torch.func.grad(lambda t: loss(Z, t))(temperatures[0]),
            lambda: torch.func.vmap(torch.func.grad(lambda t: loss(Z, t)))(temperatures),
            lambda: torch.func.grad(lambda z: fastcl.twin_stats(z, Z, SAMPLE, temperature=0.3).a.lse_other.sum())(Z),
        ):
            with pytest.raises(FastclError, match=f"{name} backend .*backend\\('dense'\\).*torch.func.grad"):
                transformed()
    with pytest.raises(FastclError, match="vmap"):
        torch.func.vmap(lambda z: torch.tensor(fastcl.linear_cka(z, Z)))(Z.repeat(2, 1, 1))


@pytest.mark.parametrize("name", ["dense", "chunked", "triton"])
def test_the_meta_device_holds_no_values(name):
    meta, sample = Z.to("meta"), SAMPLE.to("meta")
    calls = {
        "z1": lambda: fastcl.ntxent_loss(meta, meta),
        "z": lambda: fastcl.contrastive_loss(meta, sample),
        "x": lambda: fastcl.row_stats(meta, sample=sample, temperature=0.3),
        "za": lambda: fastcl.twin_stats(meta, meta, sample, temperature=0.3),
        "temperature": lambda: fastcl.ntxent_loss(Z, Z, torch.tensor(0.3, device="meta")),
        "features of 'x'": lambda: fastcl.pair_stats(meta, meta),
    }
    calls["outputs of layer '0'"] = lambda: fastcl.layer_cka(*[torch.nn.Sequential(torch.nn.ReLU())] * 2, [meta])
    for argument, call in calls.items():
        with fastcl.backend(name), pytest.raises(FastclError, match=f"{argument} must be on cpu or cuda.* on meta"):
            call()


def test_without_triton_automatic_is_chunked_and_triton_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    rows = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32, shape=(4, 3))
    assert dispatch.choose(rows) == last_backend() == "chunked" and not dispatch.on_triton(rows)
    with fastcl.backend("triton"):
        for call in (lambda: dispatch.choose(rows), lambda: loss(Z), lambda: fastcl.pair_stats(Z, Z)):
            with pytest.raises(FastclError, match="needs Triton, which is not installed.* got .*float32"):
                call()
    monkeypatch.undo()
    assert dispatch.choose(rows) == "triton"


def test_importing_fastcl_brings_no_compiler():
    code = "import sys, torch; before = set(sys.modules); import fastcl; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    roots = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
    assert not [name for name in loaded.split() for root in roots if name == root or name.startswith(f"{root}.")]
