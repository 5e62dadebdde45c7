"""What few rows take on the Triton backend: programs that share two blocks, and weights that the forward pass leaves
for the backward pass."""

import pytest
import torch
import triton
import triton.language as tl
from reference import TOLERANCE, normal
from triton_runs import DEVICE, launches, leaf, tiles

import fastcl
from fastcl.kernels.common.launch import folded
from fastcl.kernels.contrastive.statistics import programs_of


@triton.jit
def programs_kernel(found, n_blocks, both):
    block = tl.program_id(0)
    tl.store(found + block, programs_of(block, n_blocks, both))


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
