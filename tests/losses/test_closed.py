"""The losses' derivatives written out, against autograd on their closed forms."""

import itertools

import pytest
import torch
from reference import normal

from fastcl import Objective, RowStats
from fastcl.rowstats.small.closed import has_slopes, rows_and_slopes
from fastcl.rowstats.small.whole import Stats

SETS = [s for k in (1, 2, 3) for s in itertools.combinations(("view", "peer", "other"), k)]


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("positives", [s for s in SETS if "other" not in s], ids="+".join)
@pytest.mark.parametrize("denominator", SETS, ids="+".join)
def test_slopes_are_the_derivatives_of_the_closed_forms(
    denominator: tuple[str, ...], positives: tuple[str, ...], inside: bool
) -> None:
    """Every objective that can be made, rows without peers among them; peers come in pairs."""
    objective, n_peer = Objective(denominator, positives, inside), torch.arange(40) % 4 * 2
    absent = n_peer == 0
    view, lse_peer, lse_other = (normal(40, seed=k).mul(6).requires_grad_() for k in range(3))
    sum_peer = (normal(40, seed=3) * n_peer).requires_grad_()
    leaves = {"view": view, "peer": lse_peer, "other": lse_other, "sum_peer": sum_peer}
    peers = lse_peer.masked_fill(absent, -torch.inf)
    one, others = torch.ones(40, dtype=torch.int64), 5 * torch.ones(40, dtype=torch.int64)
    zero = torch.zeros(40, dtype=torch.float64)
    stats = RowStats(view, zero, view, peers, sum_peer / n_peer.clamp(min=1), lse_other, one, n_peer, others)
    want = objective(stats)
    assert has_slopes(objective) == (len({r in denominator for r in positives}) == 1)
    if not has_slopes(objective):
        return
    found = torch.autograd.grad(want.sum() + 0 * view.sum(), list(leaves.values()), materialize_grads=True)
    with torch.no_grad():
        stats_of_pairs = Stats({"view": view, "other": lse_other, "peer": peers}, 5, n_peer.double(), sum_peer)
        rows, slopes = rows_and_slopes(objective, stats_of_pairs)
    torch.testing.assert_close(rows, want.detach(), rtol=1e-11, atol=1e-11)
    for name, grad in zip(leaves, found, strict=True):
        slope = torch.as_tensor(slopes.get(name, 0.0), dtype=torch.float64).expand(40)
        # A relation without pairs has no exponentials that its slope could meet.
        ours = slope.masked_fill(absent, 0) if "peer" in name else slope
        want_of = grad.masked_fill(absent, 0) if "peer" in name else grad
        torch.testing.assert_close(ours, want_of, rtol=1e-10, atol=1e-11)
