"""Steps larger than memory: the loss and gradients of the whole batch, from parts whose activations come and go."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm

import fastcl
from fastcl import FastclError, micro_step

BATCH = 22
T = 0.4


def network(norm=nn.LayerNorm, dropout=0.0):
    torch.manual_seed(5)
    layers = [nn.Linear(10, 24), norm(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 8)]
    return nn.Sequential(*layers).double()


def batch(dtype=torch.float64):
    numbers = torch.Generator().manual_seed(2)
    views = torch.randn(2, BATCH, 10, generator=numbers, dtype=torch.float64).to(dtype)
    return views[0], views[1], torch.randint(3, (BATCH,), generator=numbers)


def parts_of(size, dtype=torch.float64):
    return list(zip(*(view.split(size) for view in batch(dtype)[:2]), strict=True))


def embedding(net):
    return lambda pair: net(torch.cat(pair)).chunk(2)


def whole(net, parts, loss):
    """One graph over all parts."""
    value = loss(*(torch.cat(column) for column in zip(*map(embedding(net), parts), strict=True)))
    value.backward()
    return value


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


LOSSES = {
    "ntxent": lambda z1, z2: fastcl.ntxent_loss(z1, z2, T),
    "nscl": lambda z1, z2: fastcl.nscl_loss(z1, z2, batch()[2], T),
    "supcon": lambda z1, z2: fastcl.supcon_loss(z1, z2, batch()[2], T),
}


@pytest.mark.parametrize("size", [1, 4, 11, 30])
@pytest.mark.parametrize("name", LOSSES)
def test_it_equals_the_single_shot(name, size):
    net, one = network(), network()
    expected = whole(one, parts_of(BATCH), LOSSES[name])
    found = micro_step(embedding(net), parts_of(size), LOSSES[name], network=net)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12) and not found.requires_grad
    assert distance(gradients(net), gradients(one)) < 1e-12


def test_the_parameters_of_the_loss_learn_too_and_gradients_add_up():
    net, one = network(), network()
    temperatures = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    whole(one, parts_of(BATCH), lambda a, b: fastcl.ntxent_loss(a, b, temperatures[0]))
    for _ in range(2):
        micro_step(embedding(net), parts_of(5), lambda a, b: fastcl.ntxent_loss(a, b, temperatures[1]), network=net)
    assert temperatures[1].grad.item() == pytest.approx(2 * temperatures[0].grad.item(), rel=1e-12)
    assert distance(gradients(net), 2 * gradients(one)) < 1e-12


def test_a_module_takes_single_tensors_and_towers_may_differ():
    net, one = network(), network()
    x = torch.cat(batch()[:2])
    one(x).square().sum(1).log().sum().backward()
    micro_step(net, x.split(7), lambda z: z.square().sum(1).log().sum())
    assert distance(gradients(net), gradients(one)) < 1e-12
    towers = nn.ModuleList([network(), network(nn.Identity)])
    pair = [tower(x) for tower, x in zip(towers, batch()[:2], strict=True)]
    fastcl.clip_loss(*pair, 5.0).backward()
    expected = gradients(towers)
    towers.zero_grad()
    micro_step(
        lambda part: (towers[0](part[0]), towers[1](part[1])), parts_of(6),
        lambda a, b: fastcl.clip_loss(a, b, 5.0), network=towers,
    )  # fmt: skip
    assert distance(gradients(towers), expected) < 1e-12


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_normalisation_works_per_part_and_moves_its_statistics_once(momentum):
    def norm(width):
        return nn.BatchNorm1d(width, momentum=momentum)

    net, one, single = network(norm), network(norm), network(norm)
    expected = whole(one, parts_of(4), LOSSES["nscl"])
    found = micro_step(embedding(net), parts_of(4), LOSSES["nscl"], network=net)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert distance(gradients(net), gradients(one)) < 1e-12
    for name, buffer in one.named_buffers():
        assert torch.equal(buffer, net.get_buffer(name)), name
    assert net[1].num_batches_tracked == 6  # parts
    whole(single, parts_of(BATCH), LOSSES["nscl"])
    assert distance(gradients(net), gradients(single)) > 0.01  # the statistics of a part are not those of the batch


def test_buffers_that_change_the_embeddings_are_replayed():
    def make():
        return spectral_norm(network(nn.Identity)[0])

    net, one = make(), make()
    before = net.parametrizations.weight[0]._u.clone()
    whole(one, parts_of(4), LOSSES["ntxent"])
    micro_step(embedding(net), parts_of(4), LOSSES["ntxent"], network=net)
    assert distance(gradients(net), gradients(one)) < 1e-12
    assert torch.equal(net.parametrizations.weight[0]._u, one.parametrizations.weight[0]._u)
    assert not torch.equal(net.parametrizations.weight[0]._u, before)


def test_dropout_is_replayed_and_goes_on_from_there():
    net, one = network(dropout=0.4), network(dropout=0.4)

    def loss(z1, z2):  # draws random numbers, as one with random negatives does
        return LOSSES["supcon"](z1, z2) * (1 + torch.rand(()))

    torch.manual_seed(9)
    expected = whole(one, parts_of(5), loss)
    after = torch.rand(3)
    torch.manual_seed(9)
    found = micro_step(embedding(net), parts_of(5), loss, network=net)
    assert torch.equal(torch.rand(3), after)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert distance(gradients(net), gradients(one)) < 1e-12
    net.zero_grad()
    micro_step(embedding(net), parts_of(5), loss, network=net)
    assert distance(gradients(net), gradients(one)) > 0.01  # other numbers in the next step


@pytest.mark.parametrize("outside", [True, False])
def test_autocast_is_replayed(outside):
    """Inside one autocast for both passes, or one for each call of `embed`."""
    net, one = (network(dropout=0.2).float() for _ in range(2))
    parts, lowered = parts_of(5, torch.float32), lambda: torch.autocast("cpu", torch.bfloat16)
    torch.manual_seed(9)
    with lowered():
        rows = [embedding(one)(part) for part in parts]
    assert rows[0][0].dtype == torch.bfloat16
    fastcl.ntxent_loss(*(torch.cat(column) for column in zip(*rows, strict=True)), T).backward()

    def embed(pair):
        with nullcontext() if outside else lowered():
            return embedding(net)(pair)

    torch.manual_seed(9)
    with lowered() if outside else nullcontext():
        micro_step(embed, parts, LOSSES["ntxent"], network=net)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    assert distance(gradients(net), gradients(one)) < 1e-2  # sums of gradients in bfloat16 in another order
    net.zero_grad()


def test_the_activations_of_one_part_are_held_at_a_time():
    held = weakref.WeakSet()
    most = [0]

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)
            most[0] = max(most[0], sum(one.tensor.numel() for one in held))

    def peak(call):
        most[0] = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            call()
        return most[0]

    net, loss = network(), lambda a, b: (a - b).square().mean()
    part = peak(lambda: whole(net, parts_of(2)[:1], loss))
    assert peak(lambda: micro_step(embedding(net), parts_of(2), loss, network=net)) <= part
    assert peak(lambda: whole(net, parts_of(2), loss)) > 5 * part


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.dist
def test_gradients_of_ddp_and_fsdp_are_exchanged_with_the_last_part(group, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one, net = network(nn.BatchNorm1d), DistributedDataParallel(network(nn.BatchNorm1d))
    exchanged = []

    def exchange(_, bucket):
        exchanged.append(bucket.buffer().clone())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    net.register_comm_hook(None, exchange)
    whole(one, parts_of(4), LOSSES["nscl"])
    for step in range(2):
        net.zero_grad()
        micro_step(embedding(net), parts_of(4), LOSSES["nscl"], network=net)
        assert len(exchanged) == step + 1
    assert distance(gradients(net), gradients(one)) < 1e-12
    assert net.module[1].num_batches_tracked == 12

    sharded = network()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded[0], sharded[-1], sharded:
        fully_shard(layer, mesh=mesh)
    one = network()
    whole(one, parts_of(4), LOSSES["nscl"])
    asked, ask = [], type(sharded).set_requires_gradient_sync
    monkeypatch.setattr(type(sharded), "set_requires_gradient_sync",
                        lambda module, now, **how: (asked.append(now), ask(module, now, **how)))  # fmt: skip
    micro_step(embedding(sharded), parts_of(4), LOSSES["nscl"], network=sharded)
    assert asked == 5 * [False, True] + 2 * [True]  # five parts without an exchange
    found = torch.cat([p.grad.full_tensor().flatten() for p in sharded.parameters()])
    assert distance(found, gradients(one)) < 1e-12


def _once(pair):
    """Rows of another number at each call."""
    _once.calls += 1
    return torch.ones(_once.calls, 2, requires_grad=True) * 1.0


_once.calls = 0


@pytest.mark.parametrize(("embed", "parts", "loss", "message"), [
    (network(), [], sum, "parts must be a sequence with at least one part, got \\[\\]"),
    (network(), iter([1]), sum, "parts must be a sequence with at least one part"),
    (lambda x: x, [1], sum, "needs network=, the module whose weights embed uses"),
    (nn.Identity(), [torch.arange(3)], sum, "must return floating-point rows, .*got \\(3,\\) of torch.int64"),
    (nn.Identity(), [3], sum, "must return floating-point rows, .*got int"),
    (network(), [batch()[0]], lambda z: z, "loss must return a scalar tensor with a gradient, got shape \\(22, 8\\)"),
    (network(), [batch()[0]], lambda z: z.detach().sum(), "got shape \\(\\) without a gradient"),
    (network(), [batch()[0]], lambda z: 3.0, "got float"),
    (network(), [batch()[0]], lambda z: torch.ones((), requires_grad=True) * 1, "depends on none of the embeddings"),
])  # fmt: skip
def test_refusals(embed, parts, loss, message):
    with pytest.raises(FastclError, match=message):
        micro_step(embed, parts, loss)


def test_what_does_not_repeat_is_refused():
    with pytest.raises(FastclError, match="part 0 gave \\(1, 2\\) in the first pass and \\(2, 2\\) in the second"):
        micro_step(_once, [1], lambda z: z.sum(), network=nn.Identity())
    with pytest.raises(FastclError, match="as many tensors for every part, got 2 for part 1 and 1 for part 0"):
        micro_step(lambda n: (torch.ones(3, 2),) * n, [1, 2], lambda *z: z[0].sum(), network=nn.Identity())
