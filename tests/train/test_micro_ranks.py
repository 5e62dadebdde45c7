"""Steps larger than memory whose weights and rows lie on two ranks: the gradient of one process on the whole batch."""

import pytest
import torch
from gloo_ranks import groups, own, ranks  # noqa: F401
from test_micro import batch, distance, embedding, gradients, network, whole
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import fastcl

pytestmark = pytest.mark.dist
CUTS = (12,)  # of 22 samples
SIZE = 4  # of a part: three parts on either rank
T = 0.4


def sharded_steps(rank, reshard, dropped):
    """Gradients of two steps in parts, added up, of sharded weights; this rank's share of the loss of the last."""
    net = network(dropout=dropped)
    mesh = DeviceMesh.from_group(groups["pair"], "cpu")
    for layer in (net[0], net[-1], net):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    first, second, labels = (rows[own(rank, CUTS, len(rows))] for rows in batch())
    parts = list(zip(first.split(SIZE), second.split(SIZE), strict=True))
    gathers = {"gather_distributed": True, "group": groups["pair"]}
    value = torch.zeros(())
    for _ in range(2):
        torch.manual_seed(rank)
        value = fastcl.micro_step(
            embedding(net), parts, lambda a, b: fastcl.nscl_loss(a, b, labels, T, **gathers), network=net
        )
    assert isinstance(net, FSDPModule) and all(p.grad.to_local().numel() < p.numel() for p in net.parameters())
    return value, torch.cat([p.grad.full_tensor().flatten() for p in net.parameters()])


def one_graph(dropped):
    """Loss and gradient of one process: rows of both ranks in their order, with the numbers that each rank draws."""
    net, rows = network(dropout=dropped), []
    first, second, labels = batch()
    for rank in range(2):
        torch.manual_seed(rank)
        mine = own(rank, CUTS, len(labels))
        for pair in zip(first[mine].split(SIZE), second[mine].split(SIZE), strict=True):
            rows.append(embedding(net)(pair))
    value = fastcl.nscl_loss(*map(torch.cat, zip(*rows, strict=True)), labels, T)
    value.backward()
    return value.detach(), gradients(net)


@pytest.mark.parametrize(("reshard", "dropped"), [(True, 0.0), (True, 0.3), (False, 0.3)])
def test_sharded_weights_get_the_gradient_of_the_whole_batch(ranks, reshard, dropped):  # noqa: F811
    expected, gradient = one_graph(dropped)
    if not dropped:
        one = network()
        whole(one, [batch()[:2]], lambda a, b: fastcl.nscl_loss(a, b, batch()[2], T))
        assert distance(gradient, gradients(one)) < 1e-12
    found = ranks.run(sharded_steps, reshard, dropped, world=2)
    assert sum(value for value, _ in found).item() / 2 == pytest.approx(expected.item(), rel=1e-12)
    for _, total in found:
        assert distance(total, 2 * gradient) < 1e-12
