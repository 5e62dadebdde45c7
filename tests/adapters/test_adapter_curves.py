"""A hundred steps of descent with every adapter and with its original, or its formula where that is not installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from originals import unit
from reference import normal
from test_adapters import UNEVEN, B, Case, D, each_case
from torch import Tensor

STEPS, RATE = 100, 0.05


def curve(loss: Callable[..., Tensor], case: Case) -> list[float]:
    """The losses of all steps, of float64 rows that descend."""
    leaves = [normal(*shape, seed=k) for k, shape in enumerate(case.shapes)]
    found = []
    for _ in range(STEPS):
        leaves = [v.requires_grad_() for v in leaves]
        value = loss(*(unit(v) if case.unit and v.ndim > 1 else v for v in leaves)).sum()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        leaves = [v.detach() - RATE * g for v, g in zip(leaves, gradients, strict=True)]
        found.append(value.item())
    return found


def agree(case: Case, original: Callable[..., Tensor]) -> None:
    ours, theirs = curve(case.ours, case), curve(original, case)
    assert len(set(ours)) == STEPS and ours == pytest.approx(theirs, rel=1e-9)


@each_case
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_every_adapter(case: Case) -> None:
    try:
        agree(case, case.original or case.formula)
    except pytest.skip.Exception:
        agree(case, case.formula)


@pytest.mark.parametrize("name", ("NTXentLoss", "SupConLoss"))
def test_metric_learning(name: str) -> None:
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    ours = import_module("fastcl.adapters.metric_learning")
    first, second = (getattr(module, name)(0.3) for module in (ours, theirs))
    agree(Case(name, ((B, D),), lambda z: first(z, UNEVEN), lambda: None), lambda z: second(z, UNEVEN))


@pytest.mark.parametrize("directions", (("query_to_doc",), ("query_to_doc", "doc_to_query", "doc_to_doc")))
def test_sentence_transformers(directions: tuple[str, ...]) -> None:
    if find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer import losses

    from fastcl.adapters import sentence_transformers

    first, second = (
        module.MultipleNegativesRankingLoss(torch.nn.Identity(), directions=directions).compute_loss_from_embeddings
        for module in (sentence_transformers, losses)
    )
    case = Case("ranking", ((B, D), (B, D), (B, D)), lambda *rows: first(list(rows), None), lambda: None)
    agree(case, lambda *rows: second(list(rows), None))
