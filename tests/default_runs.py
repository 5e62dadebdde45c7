"""What fastcl computes, as names and values: equal in every bit whatever PyTorch's default dtype and device are."""

import io
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import triton
from dali_views import file_split, photo
from PIL import Image
from torch import Tensor, nn

import fastcl
from bench.static import cases, view_cases
from fastcl.cli.contact_sheet import contact_sheet
from fastcl.cli.feature_files import read_features
from fastcl.data import Dataset, EvalViews, Split, ViewLoader, ViewPlan, ViewSpec, make_renderer
from fastcl.evaluation import ProbeSettings, evaluate
from fastcl.metrics import cdnv, directional_cdnv, ncc_accuracy, weight_gap
from fastcl.theory import similarity_coupling_bound

N, D = 24, 10


def ids(modulus: int, n: int = N) -> Tensor:
    return torch.from_numpy(np.arange(n) % modulus)


def drawn(seed: int, n: int = N, d: int = D, dtype: type = np.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)).astype(dtype))


def losses(backend: str) -> dict:
    """Losses and gradients of every entry point, and of temperature and rows in every form."""
    found = {}

    def take(name: str, call, *leaves: Tensor) -> None:
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with fastcl.backend(backend):
            value = call(*leaves)
        for k, g in enumerate((value, *torch.autograd.grad(value.sum(), leaves))):
            found[f"{name} {k}"] = g.detach()

    def temperature(dtype: type = np.float32) -> Tensor:
        return torch.from_numpy(np.array(0.2, dtype))

    sample, labels = ids(N // 2), ids(N // 2) % 3
    for objective in fastcl.OBJECTIVES:
        loss = partial(fastcl.contrastive_loss, sample=sample, labels=labels, objective=objective, reduction="none")
        take(objective, lambda z, t, loss=loss: loss(z, temperature=t), drawn(1), temperature())
    take("fixed", lambda z: fastcl.contrastive_loss(z, sample, labels, "supcon", 0.2), drawn(1))
    take("half", lambda z: fastcl.contrastive_loss(z, sample, labels, "nscl", 0.2), drawn(1).half())
    take("bfloat16", lambda z: fastcl.contrastive_loss(z, sample, labels, "nscl", 0.2), drawn(1).bfloat16())
    take("any norm", lambda z: fastcl.contrastive_loss(z, sample, labels, "dcl", 0.5, normalize=False), drawn(1))
    take("wide", lambda z: fastcl.ntxent_loss(z, z.flip(0)), drawn(1, 8, 300))
    take("own", lambda z: fastcl.contrastive_loss(z, sample, labels, lambda s: s.lse_other - s.mean_view), drawn(1))
    take("views", lambda a, b: fastcl.supcon_loss(a, b, labels), drawn(1), drawn(2))
    take("clip", fastcl.clip_loss, drawn(1), drawn(2), temperature())
    take("float64", lambda z, t: fastcl.ntxent_loss(z, z.flip(0), t), drawn(1, dtype=np.float64), temperature())

    def rectangular(x: Tensor, y: Tensor) -> Tensor:
        stats = fastcl.row_stats(
            x, y, sample=sample, sample_y=sample[:9], labels=labels, labels_y=labels[:9], temperature=0.3, columns=True
        )
        return sum(s.lse_peer[s.n_peer > 0].sum() + s.lse_other.sum() + s.spread_view.sum() for s in stats)

    take("rectangular", rectangular, drawn(1), drawn(2, 9))

    def twins(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
        both = fastcl.twin_stats(a, b, sample, labels, temperature=t)
        pairs = both.pairs()
        found["pairs"] = [pairs.cka, pairs.cka_debiased, pairs.rsa, pairs.drift, pairs.rho]
        return both.a.lse_other + 2 * both.b.lse_other + fastcl.same_class_mass(both.a)

    take("twins", twins, drawn(1), drawn(2), temperature())
    return found


def similarities() -> dict:
    """All kernels and routes, an accumulator of batches, its merge and its state."""
    x, y, found = drawn(3, 40), drawn(4, 40, 7) + 3, {}
    with fastcl.backend("chunked"):
        for kernel in ("linear", "cosine", "correlation", "rbf"):
            for route in ("features", "tiles")[kernel == "rbf" :]:
                s = fastcl.pair_stats(x, y, kernel, route=route)
                found[f"{kernel} {route}"] = [s.cka, s.cka_debiased, s.rsa, s.drift, s.rho, s.r]
        found["spearman"] = [fastcl.spearman_rsa(x, y), fastcl.spearman_rsa(x, y, bins=64)]
        whole = []
        for rows in (slice(0, 25), slice(25, 40)):
            part = fastcl.PairAccumulator(("x", "y"), minibatch=True)
            part.update({"x": x[rows][:9], "y": y[rows][:9]})
            part.update({"x": x[rows][9:], "y": y[rows][9:]})
            whole.append(fastcl.PairAccumulator(("x", "y"), minibatch=True))
            whole[-1].load_state_dict(part.state_dict())
        whole[0].merge(whole[1])
        measures = ("linear.cka", "cosine.rsa", "correlation.cka_debiased", "cka_minibatch")
        found["accumulator"] = [whole[0].compute().matrix(m) for m in measures]
    return found


def kernels() -> dict:
    """Of the Triton kernels a loss with both gradients, both routes of a similarity, and views."""
    z, t, y = drawn(1, 64).requires_grad_(), torch.from_numpy(np.array(0.2, np.float32)).requires_grad_(), drawn(2, 64)
    with fastcl.backend("triton"):
        loss = fastcl.contrastive_loss(z, ids(64, 64), ids(4, 64), "supcon", t)
        routes = [fastcl.pair_stats(z, y, route=route) for route in ("features", "tiles")]
    split, spec = coloured()
    params = ViewPlan(spec, 3).draw(0, split.ids[:2], 0, split.sizes[:2])
    made = make_renderer("triton", split, spec, torch.device("cpu"))(np.arange(2), [params])
    return {"loss": [loss.detach(), *torch.autograd.grad(loss, [z, t])], "cka": [s.cka for s in routes], "views": made}


def launches() -> dict:
    """What every launch of the Triton kernels is given; none is started."""

    def form(value):
        if isinstance(value, tuple | list):
            return tuple(map(form, value))
        if is_dataclass(value):  # a descriptor of a tensor
            return tuple(form(getattr(value, field.name)) for field in fields(value))
        value = value.value if isinstance(value, triton.language.constexpr) else value
        return (value.dtype, value.device, tuple(value.shape)) if isinstance(value, Tensor) else value

    def forms(recorded) -> list:
        return [(launch.grid, [(name, form(v)) for name, v in launch.arguments.items()]) for launch in recorded]

    return {name: forms(recorded) for name, recorded in (*cases.cases(90), *view_cases.cases(90))}


def model(seed: int) -> nn.Module:
    """Two layers with drawn weights."""
    layers = [nn.Linear(D, 12, dtype=torch.float32, device="cpu"), nn.Linear(12, 5, dtype=torch.float32, device="cpu")]
    for k, layer in enumerate(layers):
        layer.weight.data.copy_(drawn(10 * seed + k, *layer.weight.shape))
        layer.bias.data.zero_()
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


def measures(folder: Path) -> dict:
    """Of layers, of features in a file, of weights, and the theorem's bound."""
    a, b = model(1), model(2)
    np.save(folder / "x.npy", drawn(5).numpy())
    x, labels = read_features(folder / "x.npy"), ids(4)
    bound = similarity_coupling_bound([0.1] * 3, 64, 0.5, 0.1, n=100)
    return {
        "layers": fastcl.layer_cka(a, b, [drawn(7), drawn(8)]).matrix,
        "features": [x, cdnv(x, labels), directional_cdnv(x, labels), ncc_accuracy(x, labels, drawn(6), labels)],
        "probes": evaluate(x, labels, drawn(6), labels, settings=ProbeSettings(penalties=(0.1, 1.0), repeats=2)),
        "weights": weight_gap(a, b),
        "bound": [bound.log10, bound.log10_printed],
    }


def coloured() -> tuple[Split, ViewSpec]:
    """JPEG files of one size, and a spec of every operation there is."""
    files = []
    for k in range(10):
        buffer = io.BytesIO()
        Image.fromarray(photo(k)).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    spec = ViewSpec(
        size=16, rotation=20.0, jitter=1.0, hue=0.3, grayscale=0.3, blur=0.6, blur_kernel=5, solarize=0.3,
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010),
    )  # fmt: skip
    return file_split(files), spec


def views(renderer: str) -> dict:
    """Batches of every kind, made at once and ahead, and a grey picture."""
    split, spec = coloured()
    found = {}
    for workers in (0, 1):
        made = make_renderer(renderer, split, spec, torch.device("cpu"))
        loader = ViewLoader(split, ViewPlan(spec, 3), 4, renderer=made, workers=workers)
        found[f"batches {workers}"] = [[*batch.views, batch.labels, batch.ids] for batch in loader]
        evaluated = EvalViews(split, loader.plan, made, workers=workers)
        found[f"evaluation {workers}"] = list(evaluated.batches(4))
    grey = Split(split.ids, split.labels, split.sizes, lambda i: split.image(i)[:, :, :1])
    spec = ViewSpec(size=16, blur=1.0, solarize=0.5, jitter=1.0)
    made, here = make_renderer(renderer, grey, spec, torch.device("cpu")), np.arange(4)
    found["grey"] = list(made(here, [ViewPlan(spec, 1).draw(0, grey.ids[:4], 0, grey.sizes[:4])]))
    return found


def sheet(folder: Path) -> dict:
    """The contact sheet's picture and numbers."""
    split, spec = coloured()
    data = Dataset("noise", ("a",), 3, split, split)
    apart = contact_sheet(data, spec, folder / "sheet.png", renderers=("dali",), samples=2, device=torch.device("cpu"))
    return {"apart": list(apart.values()), "picture": (folder / "sheet.png").read_bytes()}


def flattened(value) -> list:
    """A value as comparable ones: bits of tensors with their dtype, exact numbers."""
    if isinstance(value, Tensor):
        return [value.dtype, value.device, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()]
    if isinstance(value, list | tuple):
        return [flattened(v) for v in value]
    if isinstance(value, dict):
        return [(name, flattened(v)) for name, v in value.items()]
    return [repr(value)]
