"""What other programs have stored is read in blocks: here there are more programs than a block holds."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from reference import normal
from triton_runs import DEVICE, launches, tiles

import fastcl
from fastcl.kernels.common import launch
from fastcl.kernels.contrastive.totals import added_up


@triton.jit
def sum_kernel(sums, total, n, MANY: tl.constexpr):
    tl.store(total, added_up(sums, n, MANY))


@pytest.mark.parametrize("n", (1, 1023, 1024, 1025, 3000))
def test_all_parts_are_added_up(n: int) -> None:
    parts = torch.arange(4096, dtype=torch.float32, device=DEVICE) % 61  # whole numbers: every order gives one sum
    total = torch.empty((), device=DEVICE)
    sum_kernel[(1,)](parts, total, n, n > 1024)
    assert total == parts[:n].sum()


@pytest.mark.parametrize("first", (0, 511, 512, 997))
def test_the_largest_derivative_is_found_among_all_maxima(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    z1, z2 = (normal(8, 4, seed=k).float().to(DEVICE).requires_grad_() for k in range(2))
    bounds, start = [], launch.launch

    def padded(kernel: Any, *options: Any, **given: Any) -> None:
        if kernel.fn.__name__ == "weights_kernel" and bounds:
            many = torch.zeros(1000, device=DEVICE)
            scale = given["scale"]
            many[first : first + scale.n] = scale.maxima
            given["scale"] = scale._replace(maxima=many, n=1000)
        start(kernel, *options, **given)
        if kernel.fn.__name__ == "weights_kernel":
            bounds.append(float(given["scale"].bound))

    monkeypatch.setattr(launch, "launch", padded)
    for _ in range(2):
        with launches():
            fastcl.ntxent_loss(z1, z2, reduction="none").sum().backward()
    assert len(bounds) == 2 and bounds[0] == bounds[1] > 0


def test_a_mean_that_both_kernels_of_the_forward_pass_evaluate() -> None:
    """Two programs of `finish_kernel`, then, since the fixed shift does not suffice, four of the online kernel."""
    rows = [normal(70, 4, seed=k).float().to(DEVICE) for k in range(2)]
    t = torch.tensor(0.002, device=DEVICE)
    with launches() as ran, tiles(64, 64):
        loss = fastcl.ntxent_loss(*rows, t)
    assert ran.flag() == 1 and [one.grid for one in ran.of("forward_online_kernel")] == [(4,)]
    with fastcl.backend("dense"):
        torch.testing.assert_close(loss, fastcl.ntxent_loss(*rows, t), rtol=1e-5, atol=0)
