"""The kernels written by hand for sm_90 for wide rows: their own code on a model of barriers, copies and products."""

from itertools import product
from math import lcm
from types import SimpleNamespace
from typing import Any

import gluon_run
import numpy as np
import pytest
import torch
from gluon_model import Fault
from reference import normal
from torch import Tensor
from triton_runs import DEVICE, check, check_stats, few_programs  # noqa: F401

from fastcl.kernels.common.arguments import Parts, Resident, Streamed, Temperature, Tile, fixed
from fastcl.kernels.common.launch import Config, Launch
from fastcl.kernels.common.launch import config as launch_config
from fastcl.kernels.common.ring import Ring
from fastcl.rowstats.triton import hopper, operand, wide

pytest.importorskip("triton.experimental.gluon")
from fastcl.kernels.common.multiply_hopper import Columns
from fastcl.kernels.contrastive.backward import Weights
from fastcl.kernels.contrastive.weights_hopper import weights_hopper_kernel
from fastcl.kernels.contrastive.wide import Pairs
from fastcl.kernels.contrastive.wide_forward_hopper import wide_forward_hopper_kernel

ALIGN, BAND = 128, 64
CLASSES = 9  # of ALIGN rows: a band has 0 to 8 of them before its own
RESIDENT, STREAMED, WIDTH, STEPS = 3 * BAND, 256, 2, 3  # a tile, and its blocks of columns
ROWS = CLASSES * ALIGN
BLOCKS = ROWS // RESIDENT


def described(z: Tensor, rows: int) -> Any:
    """What the kernels ask of a TMA descriptor; the real one allows no blocks this narrow."""
    return SimpleNamespace(base=z[0], block_shape=[rows, WIDTH], layout=None)


def sides(n: int, stages: int) -> dict[str, Any]:
    """n rows against themselves, in classes of ALIGN."""
    z = normal(1, ROWS, STEPS * WIDTH).half() * 64
    starts = torch.arange(ROWS, dtype=torch.int32) // ALIGN * ALIGN
    return {
        "r": Resident(z, None, starts, starts + ALIGN, starts, n, ROWS),
        "s": Streamed(z, None, starts, starts, n, ROWS), "temperature": Temperature(None, None, 0.5),
        "RING": fixed(Ring(stages, 3, 0)), "COLUMNS": fixed(Columns(STEPS, WIDTH)),
    }  # fmt: skip


def tile(block_r: int, block_s: int) -> Tile:
    """Its constants."""
    return fixed(Tile(STEPS * WIDTH, block_r, block_s, WIDTH, ALIGN, True, False, False))


def forward(stages: int, splits: int = 1, padding: int = 0, symmetric: bool = True) -> tuple[Launch, Tensor, Tensor]:
    """A launch, its sums of resident rows (programs of a block, rows), and those of streamed rows by band."""
    given = sides(ROWS - padding, stages)
    resident = torch.full((splits, 3, ROWS), torch.nan)
    streamed = torch.full((3 * BLOCKS if symmetric else 0, ROWS), torch.nan)
    parts = Parts(resident, streamed if symmetric else None, 0, BLOCKS, 0)
    arguments = given | {
        "z_r": described(given["r"].z, BAND), "z_s": described(given["r"].z, STREAMED), "parts": parts,
        "TILE": tile(RESIDENT, STREAMED), "SYMMETRIC": symmetric,
    }  # fmt: skip
    return Launch(wide_forward_hopper_kernel, (BLOCKS, splits), 4, 1, arguments), resident, streamed


def weights(stages: int, splits: int = 1, first: int = 0) -> tuple[Launch, Tensor]:
    """A launch over the block of pairs of all rows with those from `first` on, and the weights that it stores."""
    given = sides(ROWS, stages)
    w = Weights(normal(5, ROWS).float().abs(), torch.empty(0), torch.empty(0))
    size = 2 * lcm(RESIDENT, STREAMED)
    stored = torch.full((1, size, size), torch.nan, dtype=torch.float16)
    arguments = given | {
        "z_r": described(given["r"].z, STREAMED), "z_s": described(given["r"].z, BAND), "w_r": w, "w_s": w,
        "pairs": Pairs(stored, first, 0, size), "TILE": tile(STREAMED, RESIDENT),
    }  # fmt: skip
    return Launch(weights_hopper_kernel, (BLOCKS, splits), 4, 1, arguments), stored[0]


def exponentials(launch: Launch) -> np.ndarray:
    """Of all pairs of rows."""
    z = launch.arguments["r"].z[0].float().numpy() / 256
    return np.exp(z @ z.T * 2)


@pytest.mark.parametrize("stages", [2, 3, 4, 7])
@pytest.mark.parametrize(
    ("splits", "padding", "symmetric"), [(1, 0, True), (3, 1, True), (2, 200, False), (1, 200, True)]
)
def test_forward_keeps_the_rules_and_its_sums_for_every_number_of_tiles(stages, splits, padding, symmetric):
    launch, resident, streamed = forward(stages, splits, padding, symmetric)
    gluon_run.run(launch, seed=splits)
    n = ROWS - padding
    block, there = np.arange(ROWS) // ALIGN, np.arange(ROWS) < n // ALIGN * ALIGN
    plain = block[:, None] > block[None, :] if symmetric else block[:, None] != block[None, :]
    e = exponentials(launch) * plain * there * (np.arange(ROWS) < n)[:, None]
    sums = resident.sum(0).numpy()
    assert np.isnan(sums[:, n:]).all() and not sums[1:, :n].any()
    np.testing.assert_allclose(sums[0, :n], e.sum(1)[:n], rtol=1e-5)
    for k, found in enumerate(streamed):  # a band has all its tiles' sums, and no others
        before = min(k * BAND, n - 1) // ALIGN * ALIGN
        np.testing.assert_allclose(found[:before], e[k * BAND : (k + 1) * BAND, :before].sum(0), rtol=1e-5)
        assert found[before:].isnan().all()


@pytest.mark.parametrize(("stages", "splits"), [(2, 1), (3, 2), (4, 4), (5, 8)])
@pytest.mark.parametrize("first", [0, 512])
def test_weights_keep_the_rules_for_every_number_of_tiles(stages, splits, first):
    launch, stored = weights(stages, splits, first)
    gluon_run.run(launch, seed=stages)
    w = launch.arguments["w_r"].weights[0].numpy()
    truth = (exponentials(launch) * (w[:, None] + w[None, :]))[:, first:]
    np.testing.assert_allclose(stored[:ROWS, : ROWS - first].float(), truth, rtol=2e-3)
    written = -(-(ROWS - first) // STREAMED) * STREAMED
    assert stored[:, written:].isnan().all()  # nothing beyond the last tile


FULL = "mbarrier.wait(factors.full.index(at), filled(turn, RING))"
EMPTY = "mbarrier.wait(factors.empty.index(at), released(turn, RING))"
DONE, ARRIVE = "b_p = warpgroup_mma_wait(0, [b_p])", "mbarrier.arrive(factors.empty.index(at), count=1)"
SIZE = "RING.CONSUMERS * factors.z_r.block_type.nbytes"
ONE = {SIZE: SIZE.removeprefix("RING.CONSUMERS * ")}
AHEAD = "factors, tiles, turn + RING.STAGES - 1, RING"
# What is changed in the source of what both kernels share, and what the model says.
FAULTS = {
    **gluon_run.faults_of_a_ring(FULL, EMPTY, ARRIVE),
    "a stage is released too early": ({DONE: ARRIVE, ARRIVE: DONE}, "in use"),
    "one consumer need not release": ({"count=RING.CONSUMERS": "count=RING.CONSUMERS - 1"}, "in use|arrivals|deadlock"),
    "a product is used before its wait": ({DONE: "pass"}, "in use"),
    "one band of the resident rows is expected": (ONE, "deadlock|not there yet"),
    "a copy is for the turn after": ({AHEAD: AHEAD.replace("- 1", "- 0")}, "in use|deadlock|more arrivals"),
    "the first copies are left out": ({"begin_copies(factors, tiles, RING, COLUMNS)": "pass"}, "deadlock"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", [forward, weights])
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(kernel, name):
    edits, message = FAULTS[name]
    with pytest.raises((Fault, TypeError, AttributeError), match=message):
        for stages, seed in product((2, 4), range(4)):
            gluon_run.run(kernel(stages)[0], seed, edits)


def config(kernel: str, *_: Any) -> Config | None:
    """A launch table of large tiles."""
    by_hand = {
        "forward_hopper": Config(192, 256, 32, 12, 7, consumers=3),
        "weights_hopper": Config(256, 192, 64, 12, 4, consumers=3),
    }
    return by_hand.get(kernel, None if kernel.endswith(("_joint", "_plain", "_masked")) else Config(128, 128, 64, 4, 1))


@pytest.fixture
def on_the_model(monkeypatch, few_programs):  # noqa: F811
    """The kernels by hand are on; the names of those that ran on the model."""
    ran = []

    def launch(kernel, grid, warps, stages, **arguments):
        ran.append(kernel.fn.__name__)
        gluon_run.run(Launch(kernel, grid, warps, stages, arguments))

    monkeypatch.setattr(hopper, "launch", launch)
    monkeypatch.setattr(operand, "config", config)
    with hopper.using(True):
        yield ran


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the model runs on the CPU")
@pytest.mark.parametrize(("pairs", "blocks"), [(2 * 768**2, 3), (2 * 1536**2, 1)])
def test_losses_and_gradients_with_the_kernels_by_hand(on_the_model, monkeypatch, pairs, blocks):
    monkeypatch.setattr(wide, "WORKSPACE", pairs)
    ran = check(["ntxent"], normal(840, 300).float(), torch.arange(840) // 2, None, 0.2, "fp16")
    assert on_the_model == ["wide_forward_hopper_kernel", *["weights_hopper_kernel"] * blocks]
    assert [one.arguments["PLAIN"] for one in ran.of("forward_kernel")] == [False]
    assert not ran.of("pair_weights_kernel") and ran.of("masked_weights_kernel")


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the model runs on the CPU")
def test_candidates_of_their_own_with_the_kernels_by_hand(on_the_model):
    ids = {"sample": torch.arange(300), "sample_y": torch.arange(700)}
    x, y = normal(300, 300).float(), normal(700, 300, seed=1).float()
    ran = check_stats(["mean_view", "lse_other"], x, y, ids, 0.2, "fp16")
    assert on_the_model == ["wide_forward_hopper_kernel", "weights_hopper_kernel"]  # which serve both sides
    assert not ran.of("pair_weights_kernel")


def test_masked_tiles_are_the_blocks_that_plain_ones_leave_out():
    for d in (320, 512, 1024, 4096):
        assert launch_config("forward", 90, "none", d, 2**16).block_s == ALIGN == operand.ALIGN
        assert launch_config("forward_masked", 90, "none", d, 2**16) is None
        by_hand = launch_config("weights_hopper", 90, "none", d, 2**16)
        masked = launch_config("weights", 90, "none", d, 2**16)
        assert by_hand.block_r % masked.block_r == 0 and ALIGN % masked.block_s == 0
