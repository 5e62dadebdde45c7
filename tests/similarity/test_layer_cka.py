"""CKA of all pairs of layers: against PairStats, against U-centring written out, and what hooks must leave behind."""

import math

import pytest
import torch
from torch import nn

import fastcl
from fastcl import FastclError, layer_cka, pair_stats
from fastcl.similarity import layers as module


class Block(nn.Module):
    """Two convolutions with one in-place ReLU that is called twice, and a branch that is never called."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.act(self.conv2(self.act(self.norm(self.conv1(x)))) + x)


def network(seed, width=4, depth=2):
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
    head = nn.Sequential(nn.Flatten(), nn.Linear(width * 36, 7))
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), blocks, head)


def images(n, seed=0):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def outputs(model, names, x):
    """What the named modules of a model leave, each from a forward pass that stops right behind it."""
    found = {}
    for name in names:
        hook = model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: found.update({name: o + 0}))
        with torch.no_grad():
            model(x)
        hook.remove()
    return {name: h.flatten(1) for name, h in found.items()}


def hsic1(x, y):
    """The unbiased estimator of Song et al. 2012, term by term."""
    k, l = (v.double() @ v.double().T for v in (x, y))  # noqa: E741
    n, one = len(k), torch.ones(len(k), dtype=torch.float64)
    k, l = (m - m.diag().diag() for m in (k, l))  # noqa: E741
    product = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return ((k @ l).trace() + product - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


@pytest.mark.parametrize("n", [4, 5, 33])
def test_one_batch_is_debiased_cka_of_pair_stats(n, monkeypatch):
    monkeypatch.setattr(module, "_COLUMNS", 50)  # the convolutions' 144 outputs in three pieces
    a, b, x = network(0).eval(), network(1, width=3, depth=1).eval(), images(n)
    result = layer_cka(a, b, [x], "**", ("*", "1.*.conv?"))
    assert result.names_b == ("0", "1.0.conv1", "1.0.conv2", "1", "2") and result.left_out == (
        "1.0.spare", "1.1.spare",
    )  # fmt: skip
    blocks = [f"1.{k}.{name}" for k in (0, 1) for name in ("conv1", "norm", "conv2", "act")]  # act's last call counts
    assert [name for name in result.names_a if name in blocks] == blocks
    assert (result.batches, result.samples) == (1, n)
    left, right = outputs(a, result.names_a, x), outputs(b, result.names_b, x)
    assert result.matrix.shape == (15, 5) and result.matrix.dtype == torch.float64
    for i, p in enumerate(result.names_a):
        for j, q in enumerate(result.names_b):
            wanted = pair_stats(left[p].double(), right[q].double()).cka_debiased
            assert result.matrix[i, j] == pytest.approx(wanted, abs=1e-9), (p, q)


def test_several_batches_are_the_ratio_of_mean_hsic_1():
    a, b = network(0).eval(), network(1).eval()
    batches = [images(9, 1), images(14, 2), images(4, 3)]
    result = layer_cka(a, b, ((x, "label", 3) for x in batches))
    assert result.names_a == result.names_b == ("0", "1", "2") and result.samples == 27 and result.batches == 3
    for i, p in enumerate(result.names_a):
        for j, q in enumerate(result.names_b):
            pairs = [(outputs(a, [p], x)[p], outputs(b, [q], x)[q]) for x in batches]
            kl, kk, ll = (
                sum(hsic1(*choose(h, g)) for h, g in pairs)
                for choose in (lambda h, g: (h, g), lambda h, g: (h, h), lambda h, g: (g, g))
            )
            assert result.matrix[i, j].item() == pytest.approx((kl / (kk * ll).sqrt()).item(), abs=1e-9)


def test_independent_layers_score_about_zero_whatever_their_width():
    a, b = nn.Linear(5, 2000), nn.Linear(4, 3000)
    pick = nn.ModuleList([nn.Sequential(nn.Flatten(), layer) for layer in (a, b)])
    for at, start, model in ((0, 0, pick[0]), (1, 5, pick[1])):
        stop = start + 5 - at
        model.register_forward_pre_hook(lambda m, i, start=start, stop=stop: (i[0][:, start:stop],))
    g = torch.Generator().manual_seed(0)
    result = layer_cka(pick[0], pick[1], [torch.randn(32, 9, generator=g) for _ in range(40)], "1")
    assert abs(result.matrix.item()) < 0.1  # biased CKA of such batches is above 0.1


def test_twins_score_exactly_one_and_a_model_meets_itself():
    a, twin = network(0), network(0)
    batches = [images(8, 1), images(8, 2)]
    for other in (a, twin):
        matrix = layer_cka(a, other, batches, ("1.*", "0")).matrix
        assert matrix.diagonal().tolist() == [1.0] * 3 and torch.equal(matrix, matrix.T)
    calls = []
    a.register_forward_pre_hook(lambda m, i: calls.append(len(i[0])))
    mixed = layer_cka(a, a, batches, "0", ["2", "1.0"])
    assert calls == [8, 8] and mixed.names_b == ("1.0", "2")
    # Products of other shapes may round otherwise, in the last digits of float64.
    torch.testing.assert_close(mixed.matrix[:, :1], layer_cka(a, twin, batches, "0", "1.0").matrix, rtol=1e-14, atol=0)


def test_a_large_mean_costs_no_digits():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = x[:, :3].clone()
    models = [nn.Sequential(nn.Identity()) for _ in range(2)]
    models[1].register_forward_pre_hook(lambda m, i: (i[0][:, :3],))
    wanted = layer_cka(*models, [x]).matrix.item()
    assert wanted == pytest.approx(pair_stats(x, y).cka_debiased, abs=1e-12)
    assert layer_cka(*models, [x + 1e5]).matrix.item() == pytest.approx(wanted, abs=1e-9)


def test_outputs_in_tuples_and_dicts_and_half_precision():
    class Odd(nn.Module):
        def forward(self, x):
            return {"count": 3, "h": (None, x.bfloat16() * 2)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.mean, self.last = Odd(), nn.Identity(), nn.Identity()

        def forward(self, x):
            h = self.odd(x)["h"][1].float()
            return self.last(h), self.mean(h.mean(0)), self.mean(h.mean())

    x = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    result = layer_cka(Model(), Model(), [x])
    assert result.names_a == ("odd", "last") and result.left_out == ("mean",)
    assert torch.allclose(result.matrix, torch.ones(2, 2, dtype=torch.float64), atol=1e-12)


def test_modes_hooks_and_gradients_are_as_before_also_after_an_error():
    a, b = network(0).train(), network(1).eval()
    a[1][0].norm.eval()
    before = [m.training for model in (a, b) for m in model.modules()]
    means = a[1][1].norm.running_mean.clone()
    seen = []
    a[2].register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad)))

    def batches(fail):
        yield images(5)
        if fail:
            raise KeyError("disk")

    for fail in (False, True):
        if fail:
            with pytest.raises(KeyError):
                layer_cka(a, b, batches(True))
        else:
            layer_cka(a, b, batches(False))
        assert [m.training for model in (a, b) for m in model.modules()] == before
        hooks = [len(m._forward_hooks) for model in (a, b) for m in model.modules()]
        assert sum(hooks) == 1
    assert seen == [(False, False)] * 2 and torch.equal(a[1][1].norm.running_mean, means)
    a(images(5)).sum().backward()  # nothing is left in a state that training cannot use


@pytest.mark.parametrize(("pattern", "names"), [
    ("*", ["0", "1", "2"]), ("1", ["1"]), ("1.?", ["1.0", "1.1"]), ("**.conv*", ["1.0.conv1", "1.0.conv2"] * 2),
    ("1.**", None), (["2.*", "0"], ["2.0", "2.1", "0"]),
], ids=str)  # fmt: skip
def test_patterns_stay_within_a_level(pattern, names):
    found = module.match_layers(network(0), [pattern] if isinstance(pattern, str) else pattern, "layers_a")
    if pattern == "**.conv*":
        names = names[:2] + ["1.1.conv1", "1.1.conv2"]
    if pattern == "1.**":
        names = [name for name, _ in network(0).named_modules() if name.split(".")[0] == "1"]
    assert found == names


def test_errors_name_the_layer_and_the_numbers():
    a, b = network(0), network(1)

    class Broken(nn.Module):
        def forward(self, x):
            return x / 0 * 0

    nan = nn.Sequential(nn.Conv2d(3, 3, 1), Broken())
    few = "batch 1 of loader has 3 samples; HSIC_1 needs at least 4 (drop_last=True"
    for arguments, message in (
        ((a, b, [images(5), images(3)]), few),
        ((a, b, []), "loader yielded no batches"), ((a, b, ["x"]), "batch 0 of loader must be a tensor"),
        ((a, b, [images(5)], "*", "1.0.konv1"), "layers_b: '1.0.konv1' matches none of 17 modules; did you mean '1.0."),
        ((a, b, [images(5)], ["*", "9"]), "layers_a: '9' matches none"), ((a, b, [images(5)], []), "layers_a is empty"),
        ((a, b, [images(5)], "1.*.spare"), "layers_a: none of 2 matched modules (1.0.spare, 1.1.spare) is called"),
        ((nan, b, [images(5)], "*"), "outputs of layer '1' are not finite"),
    ):  # fmt: skip
        with pytest.raises(FastclError) as error:
            layer_cka(*arguments)
        assert message in str(error.value), error.value


def test_an_undefined_layer_leaves_the_others_alone():
    """Constant, or constant to rounding as the measures over all samples have it: NaN with the reason."""

    class Layer(nn.Module):
        def __init__(self, of):
            super().__init__()
            self.of = of

        def forward(self, x):
            return self.of(x)

    kinds = {
        "constant": lambda x: x * 0 + math.pi, "collapsed": lambda x: 1 + 1e-8 * x, "zero": lambda x: 0 * x,
        "far": lambda x: (100 + 1e-5 * x).float(), "one of two batches": lambda x: x if x[0, 0] > 0 else x * 0,
    }  # fmt: skip

    class Model(nn.Module):
        def __init__(self, *of):
            super().__init__()
            self.layers = nn.ModuleList(map(Layer, of))

        def forward(self, x):
            return [layer(x) for layer in self.layers]

    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(20, 5, generator=g, dtype=torch.float64) for _ in range(2)]
    batches[0][0, 0], batches[1][0, 0] = 1, -1
    good = [lambda x: x, torch.tanh]
    wanted = layer_cka(Model(*good), Model(*good), batches, "layers.*").matrix
    for kind, of in kinds.items():
        found = layer_cka(Model(*good, of), Model(of, *good), batches, "layers.*")
        assert torch.equal(found.matrix[:2, 1:], wanted), kind
        assert found.matrix[2].isnan().all() and found.matrix[:, 0].isnan().all()
        assert list(found.undefined_a) == ["layers.2"] and list(found.undefined_b) == ["layers.0"]
        at = int(kind == "one of two batches")
        reason = found.undefined_a["layers.2"]
        start = f"batch {at}: CKA of layer 'layers.2' is undefined: HSIC_1 of the first representation with itself"
        assert reason.startswith(start) and "is not above its rounding error" in reason
        with pytest.raises(FastclError, match="HSIC_1 of the first representation with itself is zero"):
            _ = pair_stats(of(batches[at]), batches[at]).cka_debiased
    for kind in (lambda x: 1 + 1e-5 * x, lambda x: 100 + 1e-2 * x):  # what is above the threshold has its value
        found = layer_cka(Model(*good, kind), Model(*good), batches[:1], "layers.*").matrix[2]
        wanted = [pair_stats(kind(batches[0]), other(batches[0])).cka_debiased for other in good]
        assert found.tolist() == pytest.approx(wanted, rel=1e-6)


def test_progress_needs_tqdm_alone_and_is_silent_without_a_terminal(capsys, monkeypatch):
    layer_cka(network(0), network(1), [images(5)], progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    layer_cka(network(0), network(1), [images(5)])
    with pytest.raises(FastclError, match="progress=True needs tqdm"):
        layer_cka(network(0), network(1), [images(5)], progress=True)


def test_it_is_public():
    assert fastcl.layer_cka is layer_cka and fastcl.LayerCKA is module.LayerCKA


def test_a_pattern_without_a_match_does_not_list_many_layers():
    for count, listed in ((20, True), (21, False)):
        model = nn.Sequential(*(nn.Identity() for _ in range(count)))
        with pytest.raises(FastclError, match=rf"'head' matches none of {count} modules") as error:
            module.match_layers(model, ["head"], "layers")
        assert ("expected one of: 0, 1, 10," in str(error.value)) == listed
        assert str(error.value).endswith("modules") != listed
