"""The lockstep step: pair statistics of the first two models on every batch, and an identity twin that stays one."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import tiny_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import fastcl
from fastcl.train.models import STEP_VALUES, Twin, make_optimizer, make_twins
from fastcl.train.run_folder.checkpoints import Checkpoint
from fastcl.train.step import PAIR_VALUES, StepTable, fetch, partner_of, step_twins


def _twins(*models, controls=()):
    config = tiny_config(train__models=list(models), train__controls=list(controls))
    return make_twins(config, 1, 3, torch.device("cpu"))


def _steps(twins, count, batch=9, **options):
    """Tables of steps on seeded noise."""
    numbers = torch.Generator().manual_seed(5)
    tables = []
    for k in range(count):
        views, others = ([torch.randn(batch, 1, 8, 8, generator=numbers) for _ in range(2)] for _ in range(2))
        labels = torch.randint(0, 3, (batch,), generator=numbers)
        tables.append(step_twins(twins, views, others, labels, temperature=0.5, lr=0.1, seed=k, **options))
    return fetch(tables)


@pytest.mark.parametrize("models", [("dcl", "nscl"), ("dcl", "ce"), ("ce", "supcon")])
def test_a_step_measures_the_embeddings_of_the_batch(models):
    twins = _twins(*models, controls=["reseeded"])
    _steps(twins, 2)
    views = [torch.randn(7, 1, 8, 8) for _ in range(2)]
    z = [twin.embed(views).detach().double() for twin in twins[:2]]  # in training mode: batch statistics, as in a step
    labels = torch.tensor([0, 0, 1, 2, 2, 0, 1])
    (table,) = fetch([step_twins(twins, views, views, labels, temperature=0.5, lr=0.1, seed=0)])
    a, b = (u @ u.T for u in (torch.nn.functional.normalize(x) for x in z))
    pair = table.pair()
    assert table.rows == 14 and pair["drift"] == pytest.approx((a - b).norm().item(), rel=1e-6)
    below = torch.ones(14, 14).tril(-1).bool()
    assert pair["rsa"] == pytest.approx(torch.corrcoef(torch.stack([a[below], b[below]]))[0, 1].item(), abs=1e-6)
    centred = [m - m.mean(0) - m.mean(1, keepdim=True) + m.mean() for m in (a, b)]
    assert pair["cka"] == pytest.approx(torch.cosine_similarity(*(c.flatten() for c in centred), 0).item(), abs=1e-6)
    for row, x in zip(table.values, z, strict=False):
        named = dict(zip(STEP_VALUES, row, strict=True))
        assert named["nscl_loss"] == pytest.approx(fastcl.nscl_loss(*x.chunk(2), labels, 0.5).item(), rel=1e-5)
        assert named["dcl_loss"] == pytest.approx(fastcl.dcl_loss(*x.chunk(2), 0.5).item(), rel=1e-5)


@pytest.mark.parametrize(("models", "backend"), [
    *[(models, name) for models in (("nscl", "dcl"), ("dcl", "ce"), ("ce", "dcl")) for name in ("dense", "chunked")],
    (("supcon",), "chunked"), (("nscl", "dcl"), "triton"), (("supcon",), "triton"),
])  # fmt: skip
def test_the_identity_twin_is_the_reference_on_every_backend(models, backend):
    twins = _twins(*models, controls=["identity"])
    with fastcl.backend(backend), profile(activities=[ProfilerActivity.CPU]) as seen:
        tables = _steps(twins, 2)
    if backend == "triton":
        name, within = "twin" if len(models) > 1 else "fused", [(_operator_of(e), e.name) for e in seen.events()]
        assert {operator for operator, _ in within} >= {f"fastcl::{name}", "fastcl::fused_backward"}
        waits = ("aten::_local_scalar_dense", "aten::nonzero")  # launches never ask for a value of a tensor
        assert not [pair for pair in within if pair[0] and pair[1] in waits]
    states = twins[0].network.state_dict(), twins[-1].network.state_dict()
    assert all(torch.equal(v, states[1][name]) for name, v in states[0].items())
    assert all(np.array_equal(t.values[0], t.values[-1]) for t in tables)
    assert (tables[-1].sums is None) == (len(models) == 1)


def _operator_of(event):
    """The operator of fastcl's that an event of a profile belongs to; None."""
    while event is not None and not event.name.startswith("fastcl::"):
        event = event.cpu_parent
    return event.name if event is not None else None


def test_the_partner_is_the_second_model_and_no_control():
    assert partner_of(_twins("nscl", "ce", "dcl", controls=["identity"])).name == "ce"
    assert partner_of(_twins("dcl", controls=["identity", "reseeded"])) is None
    assert partner_of(_twins("dcl")) is None


def test_what_is_undefined_is_null():
    constant = StepTable(np.zeros((2, 5)), np.zeros(18), 14, 0.0)
    assert constant.pair() == {"drift": 0.0, "cka": None, "cka_debiased": None, "rsa": None}
    broken = StepTable(np.zeros((2, 5)), np.full(18, np.nan), 14, 0.0)
    assert broken.pair() == dict.fromkeys(PAIR_VALUES)


def test_networks_in_bfloat16_under_losses_in_float32():
    views = [torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    embeddings = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(train__models=["dcl", "nscl"], train__controls=["identity"], train__precision=precision)
        twins = make_twins(config, 1, 3, torch.device("cpu"))
        _steps(twins, 2)
        states = twins[0].network.state_dict(), twins[-1].network.state_dict()
        assert all(torch.equal(v, states[1][name]) and v.dtype != torch.bfloat16 for name, v in states[0].items())
        embeddings[precision] = make_twins(config, 1, 3, torch.device("cpu"))[0].embed(views).detach()
    whole, lowered = embeddings["fp32"], embeddings["bf16"]
    assert lowered.dtype == torch.float32 and torch.equal(lowered, lowered.bfloat16().float())
    assert 1e-4 < (whole - lowered).norm() / whole.norm() < 0.1
    with pytest.raises(fastcl.FastclError, match="train.precision must be 'fp32' or 'bf16', got 'fp16'"):
        tiny_config(train__precision="fp16")


def _in_parts(network, views, size):
    """Embeddings of both views with a graph, each part of the batch normalised by itself."""
    rows = [network(torch.cat(pair)).chunk(2) for pair in zip(*(view.split(size) for view in views), strict=True)]
    return torch.cat([torch.cat(column) for column in zip(*rows, strict=True)])


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_a_step_in_parts_is_that_of_one_graph_over_the_parts(dropped):
    config = tiny_config(train__models=["dcl", "supcon", "ce"], train__controls=["identity", "reseeded"])
    twins = make_twins(config, 1, 3, torch.device("cpu"))
    for twin in twins:
        twin.network.projector.insert(1, torch.nn.Dropout(dropped))
    networks = copy.deepcopy([twin.network for twin in twins])
    numbers = torch.Generator().manual_seed(5)
    views, others = ([torch.randn(10, 1, 8, 8, generator=numbers) for _ in range(2)] for _ in range(2))
    labels = torch.randint(0, 3, (10,), generator=numbers)
    (table,) = fetch([step_twins(twins, views, others, labels, temperature=0.5, lr=0.1, seed=3, micro_batch=4)])
    for twin, network, row in zip(twins, networks, table.values, strict=True):
        torch.manual_seed(3)
        z = _in_parts(network, others if twin.reseeded else views, 4)
        stats = fastcl.two_view_stats(*z.chunk(2), labels, 0.5)
        reference = Twin(twin.name, twin.objective, network, twin.optimizer, twin.reseeded, twin.lowered)
        loss = reference.loss(z, stats, labels)
        loss.backward()
        assert row[0] == pytest.approx(loss.item(), rel=1e-5)
        ours, theirs = (torch.cat([p.grad.flatten() for p in n.parameters() if p.requires_grad])
                        for n in (twin.network, network))  # fmt: skip
        assert (ours - theirs).norm() < 1e-4 * theirs.norm(), twin.name
        for name, buffer in network.named_buffers():
            assert torch.allclose(twin.network.get_buffer(name), buffer), name
    states = twins[0].network.state_dict(), twins[3].network.state_dict()
    assert all(torch.equal(v, states[1][name]) for name, v in states[0].items())


def test_one_part_is_a_step_as_any_other():
    found = [_steps(_twins("dcl", "ce"), 2, **options)[-1].values for options in ({}, {"micro_batch": 9})]
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], _steps(_twins("dcl", "ce"), 2, micro_batch=8)[-1].values)
    with pytest.raises(fastcl.FastclError, match='train.micro_batch must be positive or "none", got 0'):
        tiny_config(train__micro_batch=0)


def test_each_view_by_itself_has_batch_statistics_of_its_own():
    views = [torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    config = tiny_config(train__models=["dcl"], train__controls=[], train__joint_views=False)
    (apart,), (joint,) = make_twins(config, 1, 3, torch.device("cpu")), _twins("dcl")
    network = copy.deepcopy(apart.network).train()
    z = apart.embed(views)
    assert torch.equal(z, torch.cat([network(view) for view in views]))
    assert (z - joint.embed(views)).norm() > 0.01 * z.norm()
    counts = [twin.network.projector[1].num_batches_tracked.item() for twin in (apart, joint)]
    assert counts == [2, 1]


def test_compiled_networks_train_as_others_do(monkeypatch):
    counted = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    config = tiny_config(train__models=["dcl"], train__controls=["identity"], train__compile=True)
    twins, others = make_twins(config, 1, 3, torch.device("cpu")), _twins("dcl")
    assert counted.frame_count == 0
    ours, theirs = _steps(twins, 2), _steps(others, 2)
    assert counted.frame_count == 1  # one graph for all models
    states = [twin.network.state_dict() for twin in (*twins, *others)]
    for name, value in states[2].items():
        assert torch.equal(states[0][name], states[1][name])
        assert torch.allclose(states[0][name], value, rtol=1e-3, atol=1e-5), name
    for a, b in zip(ours, theirs, strict=True):
        assert a.values[0] == pytest.approx(b.values[0], rel=1e-4)


def test_fused_optimizers_are_those_of_a_gpu():
    with FakeTensorMode():
        there = torch.nn.Linear(3, 2, device="cuda")
    for name, asked, fused in (("sgd", True, True), ("adamw", True, True), ("sgd", False, None), ("lars", True, None)):
        config = tiny_config(optim__name=name, optim__fused=asked).optim
        assert make_optimizer(there, config).param_groups[0].get("fused") is fused
        assert make_optimizer(torch.nn.Linear(3, 2), config).param_groups[0].get("fused") is None


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_goes_on_where_optimizers_are_not_fused(name):
    config = tiny_config(train__models=["dcl"], train__controls=[], optim__name=name)
    before, after = (make_twins(config, 1, 3, torch.device("cpu")) for _ in range(2))
    _steps(before, 1)
    state = before[0].optimizer.state_dict()
    there = copy.deepcopy(state)
    for group in there["param_groups"]:
        group |= {"fused": True, "foreach": False}
    saved = {"network": before[0].network.state_dict(), "optimizer": there}
    Checkpoint(Path("here"), 1, None, {}, None, {"dcl": saved}).restore(after)
    assert after[0].optimizer.state_dict()["param_groups"] == state["param_groups"]
    tables = [_steps(twins, 1)[0].values for twins in (before, after)]
    assert np.array_equal(*tables)
