"""The kernels written by hand for sm_90: their own code on a model of barriers, copies and products, and what switches
them on. No card is needed."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import gluon_run
import numpy as np
import pytest
import torch
from gluon_model import Fault
from reference import normal
from torch import Tensor
from triton_runs import DEVICE, check, few_programs  # noqa: F401

from fastcl.kernels.common.arguments import Parts, Resident, Streamed, Temperature, Tile, fixed
from fastcl.kernels.common.launch import Config, Launch, on_architecture
from fastcl.kernels.common.ring import Ring
from fastcl.rowstats.triton import hopper, operand

pytest.importorskip("triton.experimental.gluon")
from fastcl.kernels.contrastive.backward import Accumulator, Weights
from fastcl.kernels.contrastive.backward_hopper import backward_hopper_kernel
from fastcl.kernels.contrastive.forward_hopper import forward_hopper_kernel

RINGS = [Ring(stages, consumers, 0) for stages, consumers in ((2, 2), (4, 2), (3, 3), (6, 3))]
BLOCKS, SIDE, WIDTH = 9, 4, 2  # block k has k tiles before its class range, each of SIDE x SIDE rows


def described(z: Tensor, side: int = SIDE) -> Any:
    """What the kernel asks of a TMA descriptor; the real one allows no blocks this small."""
    return SimpleNamespace(base=z[0], block_shape=[side, WIDTH], layout=None)


def sides(n: int) -> dict[str, Any]:
    """n rows against themselves, in classes of SIDE."""
    rows = BLOCKS * SIDE
    z = normal(1, rows, WIDTH).half() * 64
    starts = torch.arange(rows, dtype=torch.int32) // SIDE * SIDE
    return {
        "r": Resident(z, None, starts, starts + SIDE, starts, n, rows), "s": Streamed(z, None, starts, starts, n, rows),
        "z_s": described(z), "temperature": Temperature(None, None, 0.5),
        "TILE": fixed(Tile(WIDTH, SIDE, SIDE, WIDTH, SIDE, True, False, False)),
    }  # fmt: skip


def forward(ring: Ring, splits: int = 1, padding: int = 0, symmetric: bool = True) -> tuple[Launch, Tensor, Tensor]:
    """A launch over small blocks, its sums of resident rows (programs of a block, rows), and those of streamed rows."""
    rows = BLOCKS * SIDE
    resident = torch.full((splits * ring.CONSUMERS, 3, rows), torch.nan)
    streamed = torch.full((BLOCKS if symmetric else 0, rows), torch.nan)
    parts = Parts(resident, streamed if symmetric else None, 0, BLOCKS, 0)
    arguments = sides(rows - padding) | {"parts": parts, "RING": fixed(ring), "SYMMETRIC": symmetric}
    arguments["z_r"] = arguments["z_s"]
    return Launch(forward_hopper_kernel, (BLOCKS, splits), 4, 1, arguments), resident, streamed


def backward(stages: int, splits: int = 1, padding: int = 0) -> tuple[Launch, Tensor]:
    """A launch over small blocks, and its gradient (programs of a block, rows, columns)."""
    rows = BLOCKS * SIDE
    given = sides(rows - padding)
    weights = Weights(normal(5, rows).float().abs(), torch.empty(0), torch.empty(0))
    acc = torch.full((splits, rows, WIDTH), torch.nan)
    arguments = given | {
        "z_r": described(given["r"].z, SIDE // 2), "w_r": weights, "w_s": weights, "acc": Accumulator(acc, rows, 0),
        "RING": fixed(Ring(stages, 2, 0)),
    }  # fmt: skip
    return Launch(backward_hopper_kernel, (BLOCKS, splits), 4, 1, arguments), acc


def exponentials(launch: Launch, symmetric: bool) -> np.ndarray:
    """Exponentials of plain tiles; 0 in others."""
    r = launch.arguments["r"]
    z = r.z[0].float().numpy() / 256
    block, there = np.arange(r.rows) // SIDE, np.arange(r.rows) < r.n // SIDE * SIDE
    plain = block[:, None] > block[None, :] if symmetric else block[:, None] != block[None, :]
    return np.exp(z @ z.T * 2) * plain * there


def expected(launch: Launch, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sums over plain tiles of resident rows, and of streamed rows by block."""
    r = launch.arguments["r"]
    e = exponentials(launch, symmetric) * (np.arange(r.rows) < r.n)[:, None]
    return e.sum(1), e.reshape(BLOCKS, SIDE, r.rows).sum(1)


@pytest.mark.parametrize("ring", RINGS, ids=lambda ring: f"{ring.STAGES}-{ring.CONSUMERS}")
@pytest.mark.parametrize(("splits", "padding", "symmetric"), [(1, 0, True), (3, 1, True), (2, 3, False)])
def test_forward_keeps_the_rules_and_its_sums_for_every_number_of_tiles(ring, splits, padding, symmetric):
    launch, resident, streamed = forward(ring, splits, padding, symmetric)
    gluon_run.run(launch, seed=splits)
    rows, blocks = expected(launch, symmetric)
    n = launch.arguments["r"].n
    sums = resident.sum(0).numpy()
    assert np.isnan(sums[:, n:]).all() and not sums[1:, :n].any()
    np.testing.assert_allclose(sums[0, :n], rows[:n], rtol=1e-5)
    for k in range(len(streamed)):  # a block has all its tiles' sums, and no others
        before = k * SIDE
        np.testing.assert_allclose(streamed[k, :before], blocks[k, :before], rtol=1e-5)
        assert streamed[k, before:].isnan().all()


@pytest.mark.parametrize("stages", (1, 2, 3))
@pytest.mark.parametrize(("splits", "padding"), [(1, 0), (3, 3)])
def test_backward_keeps_the_rules_and_its_gradient_for_every_number_of_tiles(stages, splits, padding):
    launch, acc = backward(stages, splits, padding)
    gluon_run.run(launch, seed=stages)
    w = launch.arguments["w_r"].weights[0].numpy()
    z = launch.arguments["r"].z[0].float().numpy()
    weights = exponentials(launch, False) * (w[:, None] + w[None, :])
    np.testing.assert_allclose(acc.sum(0), weights @ z, rtol=2e-3, atol=2e-3 * np.abs(weights @ z).max())


FULL, EMPTY = "mbarrier.wait(b.full.index(at), filled(i, RING))", "mbarrier.wait(b.empty.index(at), released(i, RING))"
ARRIVE = "mbarrier.arrive(b.empty.index(at), count=1)"
DONE, ADDED = "b_p = warpgroup_mma_wait(0, [b_p])", "b_acc = warpgroup_mma_wait(0, [b_acc])"
BYTES = "b.full.index(at), z_s.block_type.nbytes"
# What is changed in the source of both kernels, and what the model says.
FAULTS = {
    **gluon_run.faults_of_a_ring(FULL, EMPTY, ARRIVE),
    "half of the bytes are expected": ({BYTES: f"{BYTES} // 2"}, "deadlock"),
    "the resident rows are not waited for": ({"mbarrier.wait(b.here, 0)": "pass"}, "not there yet"),
    "a product is used before its wait": ({DONE: "pass"}, "unsupported operand"),
}  # fmt: skip
TURN, OTHER = (f"stage(i{more}, RING)\n        {FULL}" for more in ("", " + FIRST"))
FORWARD_FAULTS = {
    "a stage is released too early": ({DONE: ARRIVE, ARRIVE: DONE}, "in use"),
    "a consumer takes the other's stage": ({TURN: OTHER}, "not there yet|deadlock"),
}  # fmt: skip
BACKWARD_FAULTS = {
    "a stage is released too early": ({ADDED: ARRIVE, ARRIVE: ADDED}, "in use"),
    "one consumer releases for both": ({"count=RING.CONSUMERS": "count=1"}, "in use|more arrivals"),
    "weights are not published": ({"fence_async_shared()": "pass"}, "not there yet"),
    "weights are replaced too early": ({ADDED: "pass"}, "in use|no attribute"),
}  # fmt: skip
PLANTED = [("forward", name) for name in (*FAULTS, *FORWARD_FAULTS)]
PLANTED += [("backward", name) for name in (*FAULTS, *BACKWARD_FAULTS)]


@pytest.mark.parametrize(("which", "name"), PLANTED)
def test_planted_faults_are_found(which, name):
    edits, message = (FAULTS | (FORWARD_FAULTS if which == "forward" else BACKWARD_FAULTS))[name]
    with pytest.raises((Fault, TypeError, AttributeError), match=message):
        for stages, seed in product((2, 4), range(4)):
            launch = forward(Ring(stages, 2, 0))[0] if which == "forward" else backward(stages)[0]
            gluon_run.run(launch, seed, edits)


def test_consumers_that_change_stages_would_read_too_early():
    ring, check = Ring(2, 3, 0), "gl.static_assert(RING.STAGES % RING.CONSUMERS == 0)"
    with pytest.raises(AssertionError):
        gluon_run.run(forward(ring)[0])
    with pytest.raises(Fault):
        for seed in range(4):
            gluon_run.run(forward(ring)[0], seed, {check: "pass"})


def config(kernel: str, *_: Any) -> Config | None:
    """A launch table of large tiles; the model runs kernels for narrow rows as well."""
    if kernel.endswith("_hopper"):
        return Config(128, 64, 32, 8, 4, consumers=2)
    apart = kernel.endswith(("_joint", "_plain", "_masked"))
    return None if apart else Config(128, 128, 32, 4, 1)


@pytest.fixture
def on_the_model(monkeypatch, few_programs):  # noqa: F811
    """The kernels by hand are on; the names of those that ran on the model."""
    ran = []

    def launch(kernel, grid, warps, stages, **arguments):
        ran.append(kernel.fn.__name__)
        gluon_run.run(Launch(kernel, grid, warps, stages, arguments))

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr(hopper, "WIDTHS", (32,))
    monkeypatch.setattr(operand, "config", config)
    with hopper.using(True):
        yield ran


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the model runs on the CPU")
def test_losses_and_gradients_with_the_kernels_by_hand(on_the_model):
    ran = check(["ntxent"], normal(180, 30).float(), torch.arange(180) // 2, None, 0.2, "fp16")
    assert on_the_model == ["forward_hopper_kernel", "backward_hopper_kernel"]
    for kernel in ("forward_kernel", "backward_kernel"):
        assert [one.arguments["PLAIN"] for one in ran.of(kernel)] == [False]


def test_few_rows_are_left_to_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are switched on for a process, not for a block of code, from the number of rows on that pays."""
    call = operand.Call(None, 0.5, True, "fp16", (), "none", False)
    monkeypatch.setattr(hopper, "_by_default", lambda: True)

    def takes(n: int) -> bool:
        z = torch.empty(1, n, 128, dtype=torch.float16)
        rows = operand.Operand(z[0], None, torch.empty(5, n, dtype=torch.int32), z, None, None)
        with on_architecture(90):
            return hopper.chosen("forward_hopper", rows, call) is not None

    assert [takes(n) for n in (hopper.LEAST - 1, hopper.LEAST)] == [False, True]
    with hopper.using(True):
        assert takes(256)
