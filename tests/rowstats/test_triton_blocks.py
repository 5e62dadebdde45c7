"""The Triton backend where a batch fills several blocks: class layouts, tile sizes, waves, splits, wide rows."""

import pytest
import torch
from reference import normal
from test_rowstats import FIELDS, integers
from torch import Tensor
from triton_runs import (  # noqa: F401
    DEVICE,
    Launches,
    check,
    check_stats,
    few_programs,
    launches,
    tables_own_tiles,
    tiles,
    uneven_batch,
    workspace,
)

import fastcl
from fastcl.kernels.common.launch import config, on_architecture
from fastcl.rowstats.triton import operand
from fastcl.rowstats.triton.operand import ALIGN

pytestmark = pytest.mark.usefixtures("few_programs")
TWO = torch.arange(150).repeat(2)
# Samples and labels of about 300 rows: three blocks.
LAYOUTS = {
    "unlabelled": (TWO, None),
    "one class": (TWO, TWO * 0),
    "two classes": (TWO, integers(2, 150, 1)[TWO]),
    "forty classes": (TWO, integers(40, 150, 2)[TWO]),
    "all distinct": (TWO, TWO),
    "one class of two blocks, others tiny": (TWO, torch.where(TWO < 75, 0, TWO)),
    "uneven views": uneven_batch(146),
    "three views": (torch.arange(99).repeat(3), (torch.arange(99) % 12).repeat(3)),
    "class ids as sample ids": (torch.arange(300) % 50, None),
    "no class": (TWO, TWO * 0 - 1),
}


def class_blocks(ran: Launches, kernel: str = "backward_kernel") -> tuple[int, int]:
    """Blocks of pairs that are masked because they may share a class, and blocks in all."""
    r = ran.of(kernel)[0].arguments["r"]
    n, lo, hi = r.n, r.lo_N.tolist(), r.hi_N.tolist()
    starts = range(0, n, ALIGN)
    ends = [min(start + ALIGN, n) - 1 for start in starts]
    masked = sum(-(-hi[end] // ALIGN) - lo[start] // ALIGN for start, end in zip(starts, ends, strict=True))
    return masked, len(starts) ** 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_class_layouts(layout: str) -> None:
    sample, labels = LAYOUTS[layout]
    for name, precision in (("ntxent", "fp16"),) if labels is None else (("supcon", "fp16"), ("nscl", "fp32")):
        with tiles(128, 64):
            ran = check([name], normal(len(sample), 24).float(), sample, labels, 0.1, precision)
    masked, blocks = class_blocks(ran)
    assert blocks == 9 and (masked == 9) == (layout == "one class")
    assert (masked == 3) == (layout in ("unlabelled", "all distinct", "no class"))
    assert ran.of("forward_kernel")[0].grid[1] == 2


@pytest.mark.parametrize("size", ((16, 64), (64, 32), (128, 16), (32, 128)))
def test_tile_sizes(size: tuple[int, int]) -> None:
    sample, labels = LAYOUTS["uneven views"]
    t = torch.tensor(0.1) if size[0] > 32 else 0.1
    with tiles(*size):
        if size != (32, 128):
            ran = check(["supcon"], normal(len(sample), 12).float(), sample, labels, t, "fp16")
        if size != (16, 64):
            ids = {"sample": sample[:200], "labels": labels[:200], "sample_y": sample[130:], "labels_y": labels[130:]}
            ran = check_stats(FIELDS, normal(200, 12).float(), normal(163, 12, seed=1).float(), ids, t)
    assert {one.arguments["TILE"][1:3] for one in ran.of("forward_kernel")} == {size}
    assert ran.of("forward_kernel")[0].grid[1] == {64: 2, 32: 3, 128: 1, 16: 4}[size[1]]


@pytest.mark.parametrize("kind", ("fp16", "fp32, few rows", "fp32"))
def test_the_tables_own_tiles(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, labels = LAYOUTS["uneven views"]
    t, many = torch.tensor(0.1) if kind == "fp16" else 0.004, kind == "fp32"
    own = lambda kernel, *rest: None if many and kernel.endswith("_joint") else config(kernel, *rest)  # noqa: E731
    with tables_own_tiles():
        monkeypatch.setattr(operand, "config", own)
        ran = check(["supcon"], normal(len(sample), 24).float(), sample, labels, t, kind[:4])
    assert ran.flag() == (kind != "fp16")
    chosen = [one.arguments["TILE"][1:3] for one in ran.of("forward_kernel")]
    rows = {
        "fp16": (("forward", "none"), ("forward", "peers")), "fp32, few rows": (("forward_joint", "all"),),
        "fp32": (("forward_plain", "all"), ("forward_masked", "all")),
    }[kind]  # fmt: skip
    assert chosen == [(c.block_r, c.block_s) for c in (config(kernel, 90, mode, 32, 293) for kernel, mode in rows)]


@pytest.mark.parametrize("blocks", (1, 2))
def test_waves_of_the_forward_pass(blocks: int) -> None:
    """As many resident blocks at a time as the workspace holds sums for, here 1 or 2 of 5."""
    sample, labels = LAYOUTS["uneven views"]
    waves = -(-5 // blocks)
    with tiles(64, 128), workspace(4 * 384 * blocks * 5 // 3):  # three fifths of it are for streamed rows
        ran = check(["nscl"], normal(len(sample), 12).float(), sample, labels, 0.1, "fp16")
        assert [one.grid[0] for one in ran.of("forward_kernel")] == [blocks] * (5 // blocks) + [1] * (5 % blocks)
        assert len(ran.of("finish_kernel")) == waves
        ran = check(["supcon"], normal(len(sample), 12).float(), sample, labels, torch.tensor(0.1), "fp16")
        assert len(ran.of("forward_kernel")) == waves + 1  # the masked tiles in one go
        ids = {"sample": sample, "sample_y": sample[:140]}
        x, y = normal(len(sample), 12).float(), normal(140, 12, seed=1).float()
        ran = check_stats(FIELDS, x, y, ids, 0.1)
        assert len(ran.of("forward_kernel")) == 1  # nothing is kept for streamed rows


def test_waves_of_two_towers() -> None:
    x, y = normal(300, 12).float().to(DEVICE), normal(300, 12, seed=1).float().to(DEVICE)
    results = []
    for size in (2**28, 4 * 384):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        with tiles(128, 128), workspace(size), launches() as ran:
            loss = fastcl.clip_loss(*leaves, 10.0)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        assert len(ran.of("forward_kernel")) == (1 if size == 2**28 else 3)
        assert len(ran.of("backward_kernel")) == (2 if size == 2**28 else 6)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    u, v = (w.double() / w.double().norm(dim=1, keepdim=True) for w in (x, y))
    target = torch.arange(300, device=DEVICE)
    losses = [torch.nn.functional.cross_entropy(s, target) for s in (10 * u @ v.T, 10 * v @ u.T)]
    assert results[0][0].item() == pytest.approx((sum(losses) / 2).item(), rel=1e-6)


@pytest.mark.parametrize(("layout", "precision"), (("unlabelled", "fp16"), ("two classes", "fp32")))
def test_masked_tiles_in_launches_of_their_own(layout: str, precision: str) -> None:
    sample, labels = LAYOUTS[layout]
    name = "ntxent" if labels is None else "supcon"
    for apart in (False, True):
        with tiles(64, 32, apart):
            ran = check([name], normal(len(sample), 12).float(), sample, labels, torch.tensor(0.1), precision)
        wanted = [(True, False), (False, True)] if apart else [(True, True)]
        for kernel in ("forward_kernel", "backward_kernel"):
            takes = [(one.arguments["PLAIN"], one.arguments["MASKED"]) for one in ran.of(kernel)]
            assert takes == wanted
        (online,) = ran.of("backward_online_kernel")
        assert online.arguments["PLAIN"] and online.arguments["MASKED"]


def test_waves_of_the_backward_pass() -> None:
    sample, labels = LAYOUTS["forty classes"]
    with tiles(64, 64), workspace(2 * 2 * 4 * ALIGN * 16):
        ran = check(["supcon"], normal(300, 12).float(), sample, labels, 0.1, "fp16")
    backward = ran.of("backward_kernel")
    assert len(backward) == 6 and {one.grid for one in backward} == {(2, 2)}  # three waves, plain and masked tiles
    assert [one.arguments["one"].tiles.first for one in ran.of("finalize_kernel")] == [0, 128, 256]


@pytest.mark.parametrize(("precision", "t"), (("fp16", 0.1), ("fp32", 0.005)))
def test_two_runs_are_bit_identical(precision: str, t: float) -> None:
    sample, labels = (v.to(DEVICE) for v in LAYOUTS["uneven views"])
    results = []
    for _ in range(2):
        z = normal(len(sample), 24).float().to(DEVICE).requires_grad_()
        with tiles(128, 64), launches() as ran:
            loss = fastcl.contrastive_loss(z, sample, labels, "supcon", t, precision=precision)
            results.append((loss, *torch.autograd.grad(loss, z)))
    assert max(one.grid[1] for one in ran.of("backward_kernel")) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("d", (1, 3, 8, 100, 200, 256))
def test_narrow_widths(d: int) -> None:
    sample, labels = uneven_batch()
    for name, precision in (("nscl", "fp16"), ("supcon_in", "fp32")):
        ran = check([name], normal(len(sample), d).float(), sample, labels, 0.2, precision)
        assert not ran.of("product_kernel")
        width = ran.of("backward_kernel")[0].arguments["TILE"].D
        assert width == {1: 32, 3: 32, 8: 32, 100: 128, 200: 256, 256: 256}[d]


WIDE = (
    (300, "fp16", "ntxent", 0.1),
    (300, "fp16", "supcon", torch.tensor(0.1)),
    (513, "fp32", "nscl", 0.1),
    (300, "bf16", "dcl", 0.1),
    (257, "fp32", "supcon_in", torch.tensor([0.005])),
)


@pytest.mark.parametrize(("d", "precision", "name", "t"), WIDE)
def test_wide_rows(d: int, precision: str, name: str, t: float | Tensor) -> None:
    """Square blocks of pairs: six of nine, of which three serve the rows of both sides."""
    sample, labels = uneven_batch(146)
    halves = 1 if name in ("ntxent", "dcl") else 2
    with tiles(128, 128), workspace(2 * halves * 128**2):
        ran = check([name], normal(len(sample), d).float(), sample, labels, t, precision)
    online = ran.flag() is not None
    assert len(ran.of("pair_weights_kernel")) == 6 * (1 + online) and not ran.of("backward_kernel")
    products = [one.arguments for one in ran.of("product_kernel")]
    assert [a["two"] is not None for a in products].count(True) == 3 and len(products) == 6
    assert {a["pairs"].weights.shape for a in products} == {(halves, 128, 128)}
    assert ran.flag() == (int(t < 1 / 150) if isinstance(t, Tensor) else None)


@pytest.mark.parametrize("d", (40, 300))
def test_blocks_that_share_a_class_are_as_good_as_float32(d: int) -> None:
    """Objectives that attract peers split half precision in two there: remainders of rows and of weights count too."""
    labels = TWO.clamp(max=145).where(TWO > 144, 0)  # 290 rows of one class, 10 of another: all blocks share one
    with tiles(128, 128), workspace(4 * 128**2 if d > 256 else 2**28):
        ran = check(["supcon"], normal(300, d).float(), TWO, labels, 0.1, "fp16", within="fp32")
    assert class_blocks(ran, "backward_kernel" if d < 256 else "pair_weights_kernel") == (9, 9)


@pytest.mark.parametrize(("precision", "t"), (("fp16", torch.tensor(0.1)), ("fp32", 0.004)))
def test_wide_rows_against_other_rows(precision: str, t: float | Tensor) -> None:
    ids = {"sample": integers(80, 150, 1), "sample_y": integers(80, 180, 2)}
    ids |= {"labels": integers(9, 80, 3)[ids["sample"]], "labels_y": integers(9, 80, 3)[ids["sample_y"]]}
    with tiles(128, 128), workspace(4 * 128**2):
        ran = check_stats(FIELDS, normal(150, 300).float(), normal(180, 300, seed=1).float(), ids, t, precision)
    products = [one.arguments for one in ran.of("product_kernel")]
    assert len(products) == 4 and all(a["two"] is not None for a in products)  # 2 x 2 blocks for both sides
    assert len(ran.of("pair_weights_kernel")) == 4 * (1 + (ran.flag() is not None))


def test_wide_rows_with_the_tables_tiles() -> None:
    sample, labels = uneven_batch()
    for precision in ("fp16", "fp32"):
        with tables_own_tiles():
            ran = check(["supcon"], normal(len(sample), 300).half(), sample, labels, 0.2, precision)
        assert ran.of("product_kernel")[0].arguments["one"].gradient.sums.dtype == torch.float32


@pytest.mark.parametrize(("sm", "name", "wide"), ((80, "supcon", True), (90, "supcon", True), (90, "nscl", False)))
def test_rows_without_a_backward_row_take_the_route_of_wide_ones(sm: int, name: str, wide: bool) -> None:
    sample, labels = uneven_batch()
    for precision in ("fp16", "fp32") if name == "supcon" else ("fp16",):
        with tables_own_tiles(), on_architecture(sm):
            ran = check([name], normal(len(sample), 200).float(), sample, labels, 0.2, precision)
        assert bool(ran.of("product_kernel")) == wide == (not ran.of("backward_kernel"))


@pytest.mark.parametrize("precision", ("fp16", "fp32"))
@pytest.mark.parametrize("d", (40, 100, 200, 300))
def test_losses_with_the_tiles_of_sm_100(d: int, precision: str) -> None:
    sample, labels = uneven_batch()
    with tables_own_tiles(), on_architecture(100):
        check(["ntxent", "supcon"], normal(len(sample), d).float(), sample, labels, 0.2, precision)
