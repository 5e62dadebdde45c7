"""The Triton backend: row statistics of rows against themselves and against others, and losses of two tensors."""

import pytest
import torch
from reference import (
    FORMULAS,
    assert_gradients,
    assert_loss,
    assert_temperature,
    clip_formula,
    masks,
    normal,
    row_losses,
    solve,
)
from test_rowstats import FIELDS, integers, uniform
from torch import Tensor
from triton_runs import DEVICE, check_stats, few_programs, launches, leaf, row_weights, uneven_batch  # noqa: F401

import fastcl

pytestmark = pytest.mark.usefixtures("few_programs")
LABELS = torch.tensor([0, 1, 2, 0, 1, -1, 3, -1, 3])


@pytest.mark.parametrize("temperature", (0.005, 0.2))  # about a running maximum, and with a fixed shift
@pytest.mark.parametrize("field", FIELDS)
def test_each_field(field: str, temperature: float) -> None:
    sample, labels = uneven_batch(10)
    check_stats([field], normal(len(sample), 9).float(), None, {"sample": sample, "labels": labels}, temperature)


@pytest.mark.parametrize("precision", ("fp16", "bf16", "fp32"))
def test_all_fields(precision: str) -> None:
    sample, labels = uneven_batch()
    ids = {"sample": sample, "labels": labels}
    check_stats(FIELDS, normal(len(sample), 9).float(), None, ids, torch.tensor(0.2), precision)
    check_stats(FIELDS, normal(len(sample), 9).float(), None, {"sample": sample}, 0.3, precision)


@pytest.mark.parametrize("seed", range(18))
def test_anchors_against_other_rows(seed: int) -> None:
    """Samples and classes that occur on one side only, several views across, any sizes."""
    n, k = (int(v) + 1 for v in integers(40, 2, seed))
    label = integers(6, 15, seed) - 1
    ids = {"sample": integers(12, n, seed + 1), "sample_y": integers(12, k, seed + 2) + 3}
    if seed % 3:
        ids |= {"labels": label[ids["sample"]], "labels_y": label[ids["sample_y"]]}
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 2 * (seed % 3)]
    t = (0.01, torch.tensor(0.1), 1.0, torch.tensor([0.004]))[seed % 4]
    size = 1 if seed % 5 else 0.3  # logits of rows that are not normalised stay below 700, float64's reach
    x, y = ((normal(rows, 5, seed=seed + k) * size).to(dtype) for k, rows in enumerate((n, k)))
    ran = check_stats(FIELDS, x, y, ids, t, normalize=seed % 5 > 0)
    assert not ran.of("forward_kernel")[0].arguments["SYMMETRIC"]
    (finalized,) = ran.of("finalize_kernel")  # of both sides at once
    assert [finalized.arguments[side].x.n for side in ("one", "two")] == [n, k]


def test_a_copy_of_the_anchors_is_candidates_like_any_other() -> None:
    x, sample = normal(9, 4).float(), integers(4, 9)
    check_stats(FIELDS, x, x.clone(), {"sample": sample, "sample_y": sample}, 0.3)


def test_ids_of_any_values_and_integer_dtype() -> None:
    sample, labels = uneven_batch(10)
    x = normal(len(sample), 9).float().to(DEVICE)
    with launches():
        plain = fastcl.row_stats(x, sample=sample.to(DEVICE), labels=labels.to(DEVICE), temperature=0.2)
        for kind in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
            ids = sample.to(kind), labels.to(kind if kind != torch.uint8 else torch.int8)
            if kind == torch.int64:  # the order of samples and classes stays
                ids = sample * 2**58 - 2**62, torch.where(labels < 0, -1, labels * 2**61 + (labels == 3) * (2**61 - 1))
            stats = fastcl.row_stats(x, sample=ids[0].to(DEVICE), labels=ids[1].to(DEVICE), temperature=0.2)
            for field in (*FIELDS, "n_view", "n_peer", "n_other"):
                assert torch.equal(getattr(stats, field), getattr(plain, field))


def test_the_spread_of_a_single_view_is_exactly_nothing() -> None:
    x = leaf(normal(40, 8).float())
    with launches():
        stats = fastcl.row_stats(x, sample=torch.arange(20, device=DEVICE).repeat(2), temperature=0.07)
        (grad,) = torch.autograd.grad(stats.spread_view.sum(), x)
    assert not stats.spread_view.any() and not grad.any()


def test_the_spread_of_views_in_one_place_is_that_of_their_number() -> None:
    """Logits of 300 are known to 3e-5, and so is their mean; neither shows in the spread."""
    x = normal(10, 8).float().repeat(12, 1).to(DEVICE)
    with launches():
        stats = fastcl.row_stats(x, sample=torch.arange(10, device=DEVICE).repeat(12), temperature=1 / 301.7)
    torch.testing.assert_close(stats.spread_view.cpu(), torch.full((120,), 11.0).log(), rtol=3e-7, atol=0)


def test_a_queue_without_gradient() -> None:
    """The keys' own gradient costs nothing where nobody wants it, and the anchors' is the same."""
    x, queue = normal(20, 8).float(), normal(50, 8, seed=1).float()
    ids = {"sample": torch.arange(20), "sample_y": torch.arange(50)}
    ids = {name: v.to(DEVICE) for name, v in ids.items()}
    grads = []
    for wanted in (True, False):
        a, b = leaf(x), leaf(queue).requires_grad_(wanted)
        with launches() as ran:
            stats = fastcl.row_stats(a, b, **ids, temperature=0.2)
            (stats.lse_other - stats.mean_view).mean().backward()
        (finalized,) = ran.of("finalize_kernel")
        assert len(ran.of("backward_kernel")) == 1 + wanted == 1 + (finalized.arguments["two"] is not None)
        assert len(ran.of("weights_kernel")) == 1 and (b.grad is not None) == wanted
        grads.append(a.grad)
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize(("labelled", "t"), ((False, 0.2), (False, 0.005), (True, torch.tensor(0.3))))
def test_columns_are_the_transposed_statistics(labelled: bool, t: float | Tensor) -> None:
    n, k = 30, 21
    ids = [integers(25, n, 1), integers(4, 25, 2)[integers(25, n, 1)]]
    ids_y = [integers(25, k, 3), integers(4, 25, 2)[integers(25, k, 3)]]
    names, names_y = ("sample", "labels")[: 1 + labelled], ("sample_y", "labels_y")[: 1 + labelled]
    own, other = (dict(zip(names, v, strict=False)) for v in (ids, ids_y))
    flipped, of_x = (dict(zip(names_y, v, strict=False)) for v in (ids, ids_y))
    results = []
    for at_once in (True, False):
        x, y = (leaf(v.float()) for v in (normal(n, 8), normal(k, 8, seed=1)))
        with launches() as ran:
            if at_once:
                stats = fastcl.row_stats(x, y, **own, **of_x, temperature=t, columns=True)
            else:
                stats = (
                    fastcl.row_stats(x, y, **own, **of_x, temperature=t),
                    fastcl.row_stats(y, x, **other, **flipped, temperature=t),
                )
            total = sum(
                (uniform(len(v), seed).to(DEVICE) * v.clamp(min=-1e30)).sum()
                for seed, v in enumerate(getattr(side, field) for side in stats for field in FIELDS)
                if v.isfinite().any()
            )
            grads = torch.autograd.grad(total, (x, y))
        forward = ran.of("forward_kernel")
        assert len(forward) == (1 if at_once and not labelled else 2)
        assert (forward[0].arguments["parts"].streamed is not None) == (at_once and not labelled)
        results.append([*(getattr(side, f) for side in stats for f in (*FIELDS, "n_view", "n_other")), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("scale", "dtype", "normalize"),
    (
        (14.3, torch.float32, True),
        (torch.tensor(0.5), torch.bfloat16, True),
        (torch.tensor(100.0), torch.float32, True),
        (torch.tensor([300.0]), torch.float32, True),
        (torch.tensor(14.3), torch.float16, False),
        (100.0, torch.float32, False),
    ),
)
def test_clip(scale: float | Tensor, dtype: torch.dtype, normalize: bool) -> None:
    """From one pass over the tiles. A scale on the device takes kernels that mind it; 100 is CLIP's largest."""
    precision = "fp32" if dtype == torch.float32 else "fp16"  # as the library chooses
    image, text = (normal(13, 6, seed=k).to(dtype).mul(0.6) for k in (0, 1))
    truth = solve(clip_formula, image, 1 / float(scale), text, normalize=normalize)
    leaves = [leaf(v) for v in (image, text)]
    value = float(scale)
    if isinstance(scale, Tensor):
        scale = leaf(scale)
        leaves.append(scale)
    with launches() as ran:
        loss = fastcl.clip_loss(*leaves[:2], scale, normalize)
        grads = [g.cpu() for g in torch.autograd.grad(loss, leaves)]
    assert_loss(loss.cpu(), truth, precision)
    assert_gradients(grads[:2], truth, precision)
    if len(grads) > 2:
        assert_temperature(-(scale.detach().cpu() ** 2) * grads[2], truth, precision)  # d / d (1 / scale)
    assert ran.flag() == (None if len(grads) < 3 and normalize else value > 150 or not normalize)
    (forward,) = ran.of("forward_kernel")
    assert forward.arguments["parts"].streamed is not None
    assert {one.arguments["CONSTANTS"].VIEWS for one in ran.of("prepare_kernel")} == {1}  # the order is known


def test_clip_of_one_pair_is_nothing() -> None:
    image = leaf(normal(1, 4).float())
    with launches():
        for scale in (10.0, torch.tensor(10.0, device=DEVICE)):
            loss = fastcl.clip_loss(image, normal(1, 4, seed=1).float().to(DEVICE), scale)
            (grad,) = torch.autograd.grad(loss, image)
            assert loss == 0 and not grad.any()


TWO_VIEWS = (
    ("ntxent", lambda a, b, labels, t: fastcl.ntxent_loss(a, b, t, "none")),
    ("dcl", lambda a, b, labels, t: fastcl.dcl_loss(a, b, t, "none", False)),
    ("nscl", lambda a, b, labels, t: fastcl.nscl_loss(a, b, labels, t, reduction="none")),
    ("supcon", lambda a, b, labels, t: fastcl.supcon_loss(a, b, labels, t, "none")),
)


@pytest.mark.parametrize(("name", "function"), TWO_VIEWS, ids=[name for name, _ in TWO_VIEWS])
def test_two_tensors_are_their_concatenation(name: str, function) -> None:
    """The order of the rows is known there, and labels alone are compared; rows of any stride are read in place."""
    a, b, weights = normal(9, 2, 12).float()[:, 1], normal(9, 12, seed=1).float(), row_weights(18)
    z, sample, labels = torch.cat([a, b]), torch.arange(9).repeat(2), LABELS.repeat(2)
    for t in (0.2, torch.tensor(0.25)):
        leaves = [leaf(v) for v in (a, b)]
        with launches() as ran:
            rows = function(*leaves, LABELS.to(DEVICE), t)
            grads = torch.autograd.grad((rows * weights.to(DEVICE)).sum(), leaves)
        normalize = name != "dcl"
        formula = row_losses(FORMULAS[name], masks(sample, labels))
        truth = solve(formula, z, float(t), weights=weights, normalize=normalize, subtracts=name == "supcon")
        assert_loss((rows.cpu() * weights).sum(), truth, "fp32")
        assert_gradients([torch.cat(grads).cpu()], truth, "fp32")
        (prepared,) = ran.of("prepare_kernel")
        assert prepared.arguments["one"].x.x2 is not None and prepared.arguments["CONSTANTS"].VIEWS == 2
        with launches() as plain:
            same = fastcl.contrastive_loss(
                z.to(DEVICE), sample.to(DEVICE), labels.to(DEVICE), name, t, "none", normalize=normalize
            )
        assert len(plain.of("order_kernel")) == 1 and not ran.of("order_kernel")
        torch.testing.assert_close(rows, same, rtol=2e-6, atol=2e-6)
