"""The Triton backend: rows against rows of other ranks, as anchors and as candidates, against float64."""

import pytest
import torch
from reference import TOLERANCE, normal
from torch import Tensor
from triton_runs import DEVICE, few_programs, launches, workspace  # noqa: F401

import fastcl
from fastcl.rowstats import meeting  # noqa: F401  (registers the operators)
from fastcl.rowstats.api import scaled

pytestmark = pytest.mark.usefixtures("few_programs")
FLAGGED = 1 / 140  # a temperature at which the device decides about the shift


def ids(n: int, seed: int) -> Tensor:
    """Labels of n rows, one in five unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 4, (n,), generator=generator)


def told(x: Tensor, y: Tensor, labels: Tensor | None, labels_y: Tensor | None, peers: bool) -> Tensor:
    """What another rank tells about y's rows, which have met x and more rows."""
    more = scaled(normal(9, x.shape[1], seed=8), 1.0, True) * x.norm(dim=1).mean()
    of = None if labels is None else torch.cat([labels, ids(9, 7)])
    _, lse_peer, lse_other, counts, _ = torch.ops.fastcl.apart(y, torch.cat([x, more]), labels_y, of, peers, True)
    weights = torch.rand(3, len(y), generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.5
    weights[:2] *= peers
    return torch.stack([lse_peer, lse_other, weights[0] / counts[0].clamp(min=1) / 4, weights[1], weights[2]])


def compare(
    sizes: tuple[int, int, int], labelled: bool, temperature: float, learnable: bool, precision: str = "fp32",
    peers: bool = True, normalize: bool = True, dtype: torch.dtype = torch.float32,
) -> int | None:  # fmt: skip
    """Statistics, and the gradients of rows and temperature; the flag of the call."""
    n, m, d = sizes
    x, y = (normal(rows, d, seed=rows).to(dtype) for rows in (n, m))
    labels, labels_y = (ids(n, 1), ids(m, 2)) if labelled else (None, None)
    weights = torch.rand(3, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5
    weights[:2] *= peers
    leaves = x.double().requires_grad_(), torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    xs, ys = scaled(leaves[0], leaves[1], normalize), scaled(y.double(), temperature, normalize)
    theirs = told(xs.detach(), ys, labels, labels_y, peers)
    *stats, counts, heard = torch.ops.fastcl.apart(xs, ys, labels, labels_y, peers, True)
    wanted = torch.autograd.grad([*stats, heard], leaves, [*weights, theirs])

    given = [None if v is None else v.to(DEVICE) for v in (labels, labels_y)]
    leaf, t = x.to(DEVICE).requires_grad_(), torch.tensor(temperature, device=DEVICE, requires_grad=True)
    with launches() as ran:
        found, seen, heard, *_, flag = torch.ops.fastcl.fused_apart(
            leaf, y.to(DEVICE), *given, t if learnable else None, temperature, normalize, precision, peers, True
        )
        message = torch.cat([theirs, torch.zeros(len(heard) - 5, m)]).float().to(DEVICE)
        upstream = torch.cat([torch.zeros(2, n), weights]).float().to(DEVICE)
        inputs = [leaf, t] if learnable else [leaf]
        grads = torch.autograd.grad([found, heard], inputs, [upstream, message])
    assert torch.equal(seen[1:].cpu(), counts) and not seen[0].any()
    tolerance = TOLERANCE[precision]
    for k, (got, want) in enumerate(zip(found[2:].cpu(), stats, strict=True)):
        if peers or k == 2:
            torch.testing.assert_close(
                got.double(), want, rtol=tolerance.gradient, atol=tolerance.gradient / temperature
            )
    for got, want in zip(grads, wanted, strict=False):
        error = (got.detach().cpu().double() - want).norm() / want.norm()
        room = 0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps / 2
        assert error <= 2 * tolerance.gradient + room, f"{got.shape}: {error:.1e}"
    assert ran.of("backward_kernel") or ran.of("pair_weights_kernel")
    return flag.item() if flag.numel() else None


@pytest.mark.parametrize("learnable", (False, True))
@pytest.mark.parametrize("labelled", (False, True))
def test_both_roles_from_one_product(labelled: bool, learnable: bool) -> None:
    assert compare((30, 70, 24), labelled, 0.3, learnable) == (0 if learnable else None)
    assert compare((140, 9, 24), labelled, FLAGGED, learnable) in (0, 1)


@pytest.mark.parametrize("precision", ("fp16", "bf16", "fp32"))
def test_each_precision(precision: str) -> None:
    compare((40, 30, 64), True, 0.2, True, precision)
    compare((40, 30, 64), True, 0.2, False, precision, peers=False)


def test_other_rows_and_widths() -> None:
    compare((20, 30, 300), True, 0.2, True)
    compare((20, 30, 32), True, 2.0, True, normalize=False)
    compare((20, 30, 32), True, 0.2, True, dtype=torch.bfloat16)
    compare((1, 2, 8), False, 0.5, True)
    with workspace(2**17):
        compare((300, 20, 24), True, 0.3, False)


def test_peers_that_nobody_needs_take_no_split_precision() -> None:
    x, labels = normal(20, 8).float().to(DEVICE), torch.arange(20, device=DEVICE) % 3
    for peers, attracted, split in ((False, False, False), (True, False, False), (True, True, True)):
        with launches() as ran:
            torch.ops.fastcl.fused_apart(x, x, labels, labels, None, 0.3, True, "fp16", peers, attracted)
        tiles = [one.arguments["TILE"] for one in ran.of("forward_kernel")]
        assert any(tile.SPLIT_MASKED for tile in tiles) == split and all(tile.PEERS == peers for tile in tiles)


def test_a_flag_of_another_rank_counts() -> None:
    """Rows y whose sums another rank could not hold with a fixed shift: its flag comes with its statistics."""
    x, y = (normal(rows, 16, seed=rows).float().to(DEVICE) for rows in (12, 20))
    given = x.clone().requires_grad_()
    for flagged in (0.0, 1.0):
        with launches() as ran:
            stats, _, heard, *_ = torch.ops.fastcl.fused_apart(
                given, y, None, None, None, FLAGGED, True, "fp32", True, True
            )
            message = torch.ones_like(heard) * 100
            message[5] = flagged
            torch.autograd.grad([stats, heard], given, [torch.ones_like(stats), message])
        assert {int(one.arguments["flag"]) for one in ran.of("backward_kernel")} == {int(flagged)}


@pytest.mark.parametrize("learnable", (False, True))
@pytest.mark.parametrize("normalize", (False, True))
def test_the_operators_keep_the_rules_of_torch_library(normalize: bool, learnable: bool) -> None:
    x, y = normal(10, 4).float().to(DEVICE), normal(6, 4).float().to(DEVICE)
    t = torch.tensor([0.3], device=DEVICE) if learnable else None
    options = [t, 0.0 if learnable else 0.3, normalize, "fp16", True, True]
    labels, labels_y = (torch.arange(n, device=DEVICE) % 3 for n in (10, 6))
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(torch.ops.fastcl.fused_apart.default, (leaf, y, labels, labels_y, *options))
    stats, _, heard, *saved = torch.ops.fastcl.fused_apart(x, y, labels, labels_y, *options)
    message = torch.full_like(heard, 5.0)  # log-sum-exps above all logits, as they are
    given = (x, y, True, *options, stats, saved, torch.ones_like(stats), message, [True, learnable])
    torch.library.opcheck(torch.ops.fastcl.fused_apart_backward.default, given)


def test_second_derivatives_are_refused() -> None:
    x = normal(8, 4).float().to(DEVICE).requires_grad_()
    stats, *_ = torch.ops.fastcl.fused_apart(x, x.detach(), None, None, None, 0.3, True, "fp32", True, True)
    (grad,) = torch.autograd.grad(stats.sum(), x, create_graph=True)
    with pytest.raises(fastcl.FastclError, match="second derivatives"):
        grad.sum().backward()
