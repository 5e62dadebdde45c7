"""What the benchmark of the pair statistics compares: every provider is its measures by definition."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from bench.similarity import peers as similarity_peers
from bench.similarity import plain as gram
from bench.similarity.inputs import Case, Features
from bench.similarity.providers import PROVIDERS, TOLERANCES

CPU = torch.device("cpu")
CASES = (
    Case("pair", 60, 8), Case("pair", 24, 40), Case("stream", 50, 6, chunk=20), Case("models", 30, 6, 3, "bfloat16")
)  # fmt: skip


def by_definition(models: list[torch.Tensor]) -> dict[str, list[float]]:
    """In numpy: the U-centred matrices of debiased CKA (Szekely and Rizzo 2014) in place of HSIC_1's three terms."""
    rows = [x.double().numpy() for x in models]
    n = len(rows[0])
    h = np.eye(n) - 1 / n
    off, below = 1 - np.eye(n), np.tril_indices(n, -1)

    def u_centred(k):
        k = k * off
        means = k.sum(0) / (n - 2)
        return (k - means - means[:, None] + k.sum() / ((n - 1) * (n - 2))) * off

    def correlated(a, b):
        return (a * b).sum() / ((a * a).sum() * (b * b).sum()) ** 0.5

    def rbf(x):
        squares = ((x[:, None] - x) ** 2).sum(2)
        # torch's median of an even number is the lower one.
        middle = np.sort(squares[below])[(len(below[0]) - 1) // 2]
        return np.exp(-squares / (2 * middle))

    found = {name: [] for name in gram.MEASURES}
    for i in range(len(rows)):
        for j in range(i + 1, len(rows)):
            x, y = rows[i], rows[j]
            cosine = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
            found["CKA"].append(correlated(h @ x @ x.T @ h, h @ y @ y.T @ h))
            found["debiased CKA"].append(correlated(u_centred(x @ x.T), u_centred(y @ y.T)))
            found["RSA"].append(np.corrcoef(*((1 - u @ u.T)[below] for u in cosine))[0, 1])
            found["correlation RSA"].append(np.corrcoef(*((1 - np.corrcoef(v))[below] for v in (x, y)))[0, 1])
            found["RBF CKA"].append(correlated(h @ rbf(x) @ h, h @ rbf(y) @ h))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_provider_has_the_measures_that_it_names_and_so_does_the_reference(case):
    features = Features(case, CPU)
    truth = by_definition(features.whole())
    assert gram.reference(features.whole()) == {name: pytest.approx(v, abs=1e-11) for name, v in truth.items()}
    ran = []
    for provider in PROVIDERS:
        # What a card would have in TF32 is the same code.
        if provider.devices == ("cuda",) or provider.absence(CPU) is None:
            found = provider.measure(features)
            tolerance = TOLERANCES[provider.precision]
            assert tuple(found) == provider.measures
            assert found == {k: pytest.approx(truth[k], abs=tolerance) for k in found}, provider.name
            ran.append(provider.name)
    assert len(ran) >= sum(p.ours for p in PROVIDERS)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_stream_has_the_same_rows_for_everyone_and_its_last_chunk_is_shorter():
    features = Features(Case("stream", 50, 6, chunk=20), CPU)
    lengths = [[len(x) for x in batch] for batch in features.batches()]
    assert lengths == [[20, 20], [20, 20], [10, 10]]
    assert all(map(torch.equal, features.whole(), features.whole()))
    assert not torch.equal(features.whole()[0][:20], features.whole()[0][20:40])


def test_dot_products_too_long_for_one_call_are_cut(monkeypatch):
    a, b = torch.randn(2, 7, 9, dtype=torch.float64)
    monkeypatch.setitem(gram._DOT, "cpu", 10)
    assert gram.dot(a, b) == pytest.approx(float((a * b).sum()))


def test_the_published_formulation_takes_a_subsample_and_blocks(monkeypatch):
    x, y = Features(Case("pair", 60, 8), CPU).whole()
    monkeypatch.setattr(gram, "SUBSAMPLE", 20)
    monkeypatch.setattr(gram, "_RDM_ROWS", 16)
    chosen = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:20]
    truth, part = by_definition([x, y]), by_definition([x[chosen], y[chosen]])
    assert gram.published_cka(x, y) == pytest.approx(part["CKA"][0], abs=1e-5)
    assert abs(part["CKA"][0] - truth["CKA"][0]) > 1e-3
    assert gram.published_rsa(x, y) == pytest.approx(truth["RSA"][0], abs=1e-5)


def fake_packages(monkeypatch) -> None:
    """Modules with the packages' calling conventions and this project's arithmetic."""

    class FakeCKA:
        def __init__(self, model1, model2, name1, name2, layers1, layers2, device):
            assert (layers1, layers2, device) == (["0"], ["0"], "cpu")
            self.models = model1, model2

        def compare(self, loader1, loader2):
            assert len(loader1) == 1 and loader1.dataset
            ((a,),), ((b,),) = list(loader1), list(loader2)
            self.rows = [dict(m.named_modules())["0"](batch) for m, batch in zip(self.models, (a, b), strict=True)]

        def export(self):
            return {"CKA": torch.tensor([gram.dense_linear(self.rows)["debiased CKA"]])}

    class Dataset:
        def __init__(self, measurements):
            self.measurements = measurements

    def calc_rdm(dataset, method):
        assert method == "correlation"
        return 1 - np.corrcoef(dataset.measurements)[np.tril_indices(len(dataset.measurements), -1)]

    def compare(a, b, method):
        assert method == "corr"
        return np.corrcoef(a, b)[:1, 1:]

    def cka_base(x, y, unbiased):
        return torch.tensor(gram.dense_linear([x, y])["debiased CKA" if unbiased else "CKA"][0])

    parts = {
        "torch_cka": {"CKA": FakeCKA},
        "ckatorch": {"cka_base": cka_base},
        "rsatoolbox": {},
        "rsatoolbox.data": {"Dataset": Dataset},
        "rsatoolbox.rdm": {"calc_rdm": calc_rdm, "compare": compare},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_packages_are_called_by_their_names(monkeypatch):
    fake_packages(monkeypatch)
    x, y = Features(Case("pair", 40, 5), CPU).whole()
    truth = by_definition([x, y])
    found = [similarity_peers.torch_cka(x, y), similarity_peers.ckatorch(False, x, y),
             similarity_peers.ckatorch(True, x, y), similarity_peers.rsatoolbox(x, y)]  # fmt: skip
    assert [list(values) for values in found] == [["debiased CKA"], ["CKA"], ["debiased CKA"], ["correlation RSA"]]
    for values in found:
        assert values == {k: pytest.approx(truth[k][0], abs=1e-5) for k in values}
