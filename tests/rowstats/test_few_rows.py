"""What few rows take on the Triton backend: programs that share two blocks, and weights that the forward pass leaves
for the backward pass."""

import pytest
import torch
import triton
import triton.language as tl
from reference import TOLERANCE, normal
from triton_runs import DEVICE, launches, leaf, tiles

import fastcl
from fastcl.kernels.common.arguments import fixed
from fastcl.kernels.common.launch import folded
from fastcl.kernels.contrastive.statistics import programs_of
from fastcl.kernels.contrastive.totals import Losses, Ready, complete
from fastcl.losses.objectives import OBJECTIVES


@triton.jit
def programs_kernel(found, n_blocks, both):
    block = tl.program_id(0)
    tl.store(found + block, programs_of(block, n_blocks, both))


@triton.jit
def complete_kernel(losses, BLOCKS: tl.constexpr, PEERS: tl.constexpr, CODES):
    complete(losses, losses, False, BLOCKS, False, False, 128, PEERS, CODES)


@pytest.mark.parametrize("blocks", (1, 4))
@pytest.mark.parametrize("peers", (False, True))
def test_one_scale_for_more_rows_than_are_scaled_at_a_time(peers: bool, blocks: int) -> None:
    """67 blocks of 128 rows, 4,096 rows at a time: each block's weights end on the scale of the largest divisor."""
    programs, rows = 67, 67 * 128
    weights, maxima = normal(5, rows).float(), normal(programs * blocks).float().abs() + 0.1
    found, sums, total, bound = weights.clone(), normal(1, programs).float(), torch.zeros(1), torch.zeros(1)
    arrived = torch.zeros(2, dtype=torch.int32)
    tensors = [t.to(DEVICE) for t in (found, bound, maxima, sums, total, arrived)]
    ready = Ready(tensors[0], rows, *tensors[1:3])
    losses = Losses(None, *tensors[3:], ready, 1.0, 0, rows)
    complete_kernel[(1,)](losses, blocks, peers, fixed((OBJECTIVES["ntxent"].code,)))
    scaled = weights.double()
    each = (maxima.double() / maxima.max()).repeat_interleave(128 // blocks)
    scaled[: 3 if peers else 1] *= each
    torch.testing.assert_close(tensors[0].double().cpu(), scaled, rtol=1e-6, atol=0)
    assert tensors[1].item() == maxima.max().item()
    assert tensors[4].item() == pytest.approx(sums.double().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("blocks", "both"), ((2, 2), (3, 2), (9, 3), (32, 16)))
def test_two_blocks_take_all_their_programs(blocks: int, both: int) -> None:
    """Each has at least one, and the later one, which has more tiles, no fewer; a block alone in the middle has all."""
    found = torch.zeros(blocks, dtype=torch.int32, device=DEVICE)
    programs_kernel[(blocks,)](found, blocks, both)
    half = blocks // 2
    early, late = found[:half], found.flip(0)[:half]
    assert (early + late == both).all() and (early >= 1).all() and (late >= early).all()
    assert blocks % 2 == 0 or found[half] == both


@pytest.mark.parametrize("learnable", (False, True))
def test_two_blocks_share_programs(learnable: bool) -> None:
    """Seven blocks, the last one with padding. Two backward passes of one forward pass: counters have to be 0 again."""
    views = [normal(210, 16, seed=k).float() for k in range(2)]
    found = []
    for backend, precision in (("triton", "fp32"), ("dense", None)):
        rows = [leaf(v if precision else v.double()) for v in views]
        t = leaf(torch.tensor(0.1)) if learnable else 0.1
        leaves = [*rows, t] if learnable else rows
        with launches() as ran, tiles(64, 32), fastcl.backend(backend):
            loss = fastcl.ntxent_loss(*rows, t, precision=precision)
            first, second = (torch.autograd.grad(3 * loss, leaves, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
        found.append((loss.detach(), *first))
        if precision:
            (tiled,) = ran.of("forward_kernel")
            assert tiled.arguments["FOLDED"] and tiled.grid == (4, folded(7, 14, 528)) and not ran.of("weights_kernel")
    for k, (got, want) in enumerate(zip(*found, strict=True)):
        error = torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double())
        assert error <= (TOLERANCE["fp32"].gradient if k else TOLERANCE["fp32"].loss)


@pytest.mark.parametrize("online", (False, True))
@pytest.mark.parametrize("name", ("ntxent", "nscl", "supcon", "supcon_in"))
def test_weights_of_a_mean_from_the_forward_pass(name: str, online: bool) -> None:
    """Three blocks that converged to different degrees, in classes of different sizes: each block has weights on a
    scale of its own until the last program brings all to one, and a wrong one shows in the gradient."""
    rows, sample = normal(300, 16).float(), torch.arange(300, device=DEVICE) // 2
    rows[:150] = 0.02 * rows[:150] + torch.eye(15, 16).repeat(10, 1)
    labels = torch.where(sample < 50, sample % 15, 15 + sample % 7)
    if online:  # logits beyond what exponentials without a maximum can hold
        rows = rows / rows.norm(dim=1, keepdim=True)
    found = []
    for backend, precision in (("triton", "fp32"), ("dense", None)):
        x = leaf(rows if precision else rows.double())
        options = {"temperature": 0.01 if online else 0.1, "normalize": not online, "precision": precision}
        with launches() as ran, fastcl.backend(backend):
            loss = fastcl.contrastive_loss(x, sample, labels, name, **options)
            found.append(torch.autograd.grad(-1e3 * loss, x)[0].double())
        if precision:
            assert not ran.of("weights_kernel") and bool(ran.of("backward_online_kernel")) == online
    error = torch.linalg.vector_norm(found[0] - found[1]) / torch.linalg.vector_norm(found[1])
    assert error <= TOLERANCE["fp32"].gradient


def test_weights_of_a_loss_without_a_slope() -> None:
    """The others' share of each softmax is exactly 0 in float32, and so is every derivative: its bound is not."""
    axis = torch.eye(2, 16, device=DEVICE)
    views = [leaf(torch.stack((axis[0], -axis[0]))) for _ in range(2)]
    with launches() as ran, fastcl.backend("triton"):
        loss = fastcl.ntxent_loss(*views, 0.015)
        found = torch.autograd.grad(loss, views)
    assert not ran.of("weights_kernel") and loss.item() == 0
    for one in found:
        assert one.abs().max() <= 1e-6  # 0 but for the rounding of unit rows


@pytest.mark.parametrize("upstream", (1e38, 1e-38))
def test_extreme_upstream_gradients_at_a_low_temperature(upstream: float) -> None:
    """The gradient is finite where its product with 1 / T is not."""
    rows, sample = normal(40, 16).float(), torch.arange(40, device=DEVICE) // 2
    found = []
    for backend, scale in (("triton", upstream), ("dense", 1.0)):
        x = leaf(rows if backend == "triton" else rows.double())
        precision = "fp32" if backend == "triton" else None
        with fastcl.backend(backend):
            loss = fastcl.contrastive_loss(x, sample, temperature=0.2, precision=precision)
        grad = torch.full_like(loss, scale)
        found.append(torch.autograd.grad(loss, x, grad)[0].double() / scale)
    error = torch.linalg.vector_norm(found[0] - found[1]) / torch.linalg.vector_norm(found[1])
    assert error <= TOLERANCE["fp32"].gradient
