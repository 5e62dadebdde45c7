"""The Triton backend at the edge: too few rows, zero, huge and broken rows, flags, extreme temperatures, gradients."""

import math
from collections.abc import Sequence

import pytest
import torch
from reference import FORMULAS, Masks, masks, normal
from torch import Tensor
from triton_runs import DEVICE, Launches, check, few_programs, launches, leaf, row_weights  # noqa: F401

import fastcl
from fastcl.kernels.common import numerics

pytestmark = pytest.mark.usefixtures("few_programs")
FEW = ("ntxent", "nscl", "supcon")
PEERLESS = ("nscl", "nscl_with_positive")
SAMPLE = torch.arange(9).repeat(2)  # 18 rows, two views each
CLASS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, -1]).repeat(2)
both_paths = pytest.mark.parametrize("temperature", (0.005, 0.2))  # about a running maximum, and with a fixed shift


def solved(
    names: Sequence[str],
    z: Tensor,
    sample: Tensor,
    labels: Tensor,
    temperature: float,
    upstream: float = 1.0,
    precision: str = "fp32",
    normalize: bool = True,
) -> tuple[dict[str, tuple[Tensor, Tensor]], Launches]:
    """Row losses of each objective, and the gradient of their mean times `upstream`."""
    x = leaf(z)
    with launches() as ran:
        losses = fastcl.contrastive_losses(
            x, sample.to(DEVICE), labels.to(DEVICE), names, temperature, "none", normalize, precision
        )
        found = {
            name: (rows.detach().cpu(), torch.autograd.grad(rows.mean() * upstream, x, retain_graph=True)[0].cpu())
            for name, rows in losses.items()
        }
    return found, ran


@pytest.mark.parametrize("sample", ([0], [0, 0], [0, 1], [0, 0, 0]))
def test_too_few_rows_for_a_positive_and_a_negative(sample: list[int]) -> None:
    ids = torch.tensor(sample, device=DEVICE)
    for labels in (ids, torch.zeros_like(ids)):
        x = leaf(normal(len(ids), 3).float())
        with launches():
            losses = fastcl.contrastive_losses(x, ids, labels, FORMULAS, 0.5, "none")
            (grad,) = torch.autograd.grad(sum(losses.values()).sum(), x)
        assert not torch.stack(list(losses.values())).any() and not grad.any()


def test_rows_that_count_without_contributing() -> None:
    """A sample of one view and a class of its own has no positive: loss 0, and it stays in the mean's count."""
    sample, labels = torch.cat([SAMPLE, torch.tensor([9])]), torch.cat([CLASS, torch.tensor([8])])
    z = normal(19, 4).float()
    check(list(FORMULAS), z, sample, labels, 0.2)
    with launches():
        ids = sample.to(DEVICE), labels.to(DEVICE)
        for name in FEW:
            rows = fastcl.contrastive_loss(z.to(DEVICE), *ids, name, 0.2, "none")
            mean = fastcl.contrastive_loss(z.to(DEVICE), *ids, name, 0.2)
            assert rows[-1] == 0 and (rows[:-1] != 0).all()
            assert math.isclose(mean, rows.sum() / 19, rel_tol=1e-6)


@both_paths
def test_one_class_in_the_batch(temperature: float) -> None:
    names = list(FORMULAS) if temperature > 0.1 else FEW
    found, _ = solved(names, normal(18, 4).float(), SAMPLE, SAMPLE * 0, temperature)
    for name, (rows, grad) in found.items():
        assert bool(rows.any()) == bool(grad.any()) == (name in ("ntxent", "dcl"))
        assert rows.isfinite().all() and grad.isfinite().all()


@both_paths
def test_rows_in_one_place(temperature: float) -> None:
    for z in (normal(1, 6).expand(18, 6).float(), normal(9, 6).repeat(2, 1).half()):
        check(FEW, z, SAMPLE, CLASS, temperature)
    three = torch.arange(6).repeat(3)
    check(FEW, normal(6, 6).repeat(3, 1).float(), three, three % 2, temperature)


@pytest.mark.parametrize(("dtype", "temperature"), ((torch.float32, 0.005), (torch.float16, 0.2)), ids=str)
def test_zero_rows(dtype: torch.dtype, temperature: float) -> None:
    zero = torch.arange(18) % 7 == 2
    z = normal(18, 6).to(dtype).masked_fill(zero[:, None], 0)
    check(FEW, z, SAMPLE, CLASS, temperature)
    for _, grad in solved(FEW, z, SAMPLE, CLASS, temperature)[0].values():
        assert not grad[zero].any() and (grad[~zero] != 0).any(1).all()
    for normalize in (True, False):
        for rows, grad in solved(FEW, z * 0, SAMPLE, CLASS, temperature, normalize=normalize)[0].values():
            assert rows.isfinite().all() and not grad.any()


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    (
        (torch.float32, (1e20, 1e-20)),
        (torch.float32, (1e37, 1.0, 1e-37)),
        (torch.bfloat16, (1e37, 1e-30)),
        (torch.float16, (1e4, 1e-2)),
    ),
    ids=str,
)
def test_rows_of_any_size(dtype: torch.dtype, sizes: tuple[float, ...]) -> None:
    unit = normal(18, 6)
    unit *= 3 / unit.abs().amax(1, keepdim=True)  # the largest float16 entries are 3e4
    z = (unit * torch.tensor(sizes, dtype=torch.float64).repeat(18)[:18, None]).to(dtype)
    assert z.isfinite().all() and z.any(1).all()
    check(FEW, z, SAMPLE, CLASS, 0.5)


def test_the_values_of_the_smallest_and_the_largest_rows() -> None:
    """Gradients of such rows are beyond float32; their direction is not."""
    info = torch.finfo(torch.float32)
    plain = (normal(18, 6).clamp(-1, 1) * 2**10).round().div(2**10).float()
    (want, direction), _ = solved(["nscl"], plain, SAMPLE, CLASS, 0.5)[0]["nscl"], None
    for size in (2.0**-139, 2.0**127):  # exact: the entries are multiples of 2^-10
        z = plain * size
        assert z.isfinite().all() and torch.equal(z / size, plain) and z.abs().max() in (plain.abs().max() * size,)
        assert (z.abs().max() < info.tiny) == (size < 1)
        rows, grad = solved(["nscl"], z, SAMPLE, CLASS, 0.5)[0]["nscl"]
        torch.testing.assert_close(rows, want, rtol=1e-6, atol=1e-6)
        assert not grad.isnan().any()
        if size < 1:  # the inverse norm stops at float32's largest number
            cosine = torch.nn.functional.cosine_similarity(grad.double(), direction.double())
            torch.testing.assert_close(cosine, torch.ones(18, dtype=torch.float64), rtol=1e-6, atol=0)
        else:
            assert (grad.double() * size - direction.double()).norm() <= 1e-3 * direction.double().norm()


def used(name: str, m: Masks) -> Tensor:
    """(N, N) mask of the candidates that an objective looks at."""
    return m.view | m.other if name in PEERLESS else m.view | m.peer | m.other


@pytest.mark.parametrize(
    ("normalize", "value", "temperature"),
    ((True, math.nan, 0.2), (True, math.inf, 0.005), (False, math.nan, 0.2), (False, math.inf, 0.2)),
)
def test_a_broken_row_shows_in_all_that_meet_it_and_in_no_other(
    normalize: bool, value: float, temperature: float
) -> None:
    z = normal(18, 6).float()
    for names in (["nscl"], ["ntxent", "nscl_with_positive"], ["supcon"]):
        clean, _ = solved(names, z, SAMPLE, CLASS, temperature, normalize=normalize)
        broken = z.clone()
        broken[3, 1] = value
        found, _ = solved(names, broken, SAMPLE, CLASS, temperature, normalize=normalize)
        for name, (rows, grad) in found.items():
            meets = used(name, masks(SAMPLE, CLASS))[:, 3] | (torch.arange(18) == 3)
            assert torch.equal(~rows.isfinite(), meets) and (rows[meets].isnan().all() or not normalize)
            torch.testing.assert_close(rows[~meets], clean[name][0][~meets], rtol=1e-5, atol=1e-5)
            assert not grad[3].isfinite().any()


@pytest.mark.parametrize(
    ("temperature", "upstream", "precision"),
    ((0.005, 1e-30, "fp32"), (0.02, 1e-30, "fp32"), (0.02, 1e30, "fp16"), (0.2, 1e-30, "fp16")),
)
def test_upstream_gradients_of_any_size(temperature: float, upstream: float, precision: str) -> None:
    z = normal(18, 6).float()
    plain, _ = solved(FEW, z, SAMPLE, CLASS, temperature, 1.0, precision)
    scaled, _ = solved(FEW, z, SAMPLE, CLASS, temperature, upstream, precision)
    for name in FEW:
        want, got = plain[name][1].double(), scaled[name][1].double() / upstream
        assert want.norm() > 1e-4 and (got - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize(("precision", "temperature"), (("fp16", 0.2), ("fp32", 0.2), ("fp32", 0.005)))
def test_upstream_gradients_of_very_different_sizes(precision: str, temperature: float) -> None:
    weights = 10.0 ** torch.linspace(-25, 5, 18)
    check(FEW, normal(18, 6).float(), SAMPLE, CLASS, temperature, precision, weights=weights)


SAFE, LAST = numerics.SAFE_INVERSE_T.value, numerics.LAST_INVERSE_T.value
LIMITS = (
    (60, False, None), (66, True, 0), (SAFE - 0.2, False, None), (SAFE - 0.2, True, 0), (SAFE + 1, False, 1),
    (SAFE + 1, True, 1), (LAST - 5, False, 1), (LAST + 5, False, 1), (LAST + 5, True, 1), (0.001, False, None),
)  # fmt: skip


@pytest.mark.parametrize(("inverse", "learnable", "flag"), LIMITS)
def test_rows_whose_others_are_all_opposite(inverse: float, learnable: bool, flag: int | None) -> None:
    """The smallest sums there are: where they would vanish, the device finds out and starts over."""
    z = torch.cat([torch.ones(2, 3), -torch.ones(2, 3)]) + 0.001 * normal(4, 3).float()
    sample = torch.tensor([0, 0, 1, 1])
    t = torch.tensor(1 / inverse) if learnable else 1 / inverse
    assert check(["nscl", "supcon"], z, sample, sample, t).flag() == flag
    ran = check(["ntxent"], z, sample, None, t)
    assert ran.flag() == flag


@pytest.mark.parametrize(("rows", "flag"), (("peers opposite", 1), ("one row opposite", 1), ("usual", 0)))
def test_the_flag_is_for_all_rows(rows: str, flag: int) -> None:
    """One row's sum below float32's reach, of others or of peers, sends all rows to the other kernels."""
    z, sample, labels = normal(18, 24).float(), SAMPLE, CLASS
    if rows == "peers opposite":
        labels = torch.where(SAMPLE < 2, 7, 8 + SAMPLE)
        z[1], z[10] = -z[0], -z[9]
        z[9] = z[0] + 0.01 * z[9]
        z[10] = -z[9] + 0.01 * z[8]
    elif rows == "one row opposite":
        z = z.abs()
        z[4] *= -1
        z[13] = z[4]
    labels = labels if rows == "peers opposite" else None
    for t in (0.008, torch.tensor(0.008)):
        ran = check(["supcon" if rows == "peers opposite" else "dcl"], z, sample, labels, t)
        assert ran.flag() == flag
        peers = ran.of("forward_kernel")[0].arguments["TILE"].PEERS
        assert peers == (labels is not None)


@both_paths
def test_views_of_one_sample_far_apart(temperature: float) -> None:
    """Three views, one of them opposite: their logits differ from their mean by more than float32's exp can take."""
    sample = torch.arange(6).repeat(3)
    z = normal(6, 4).repeat(3, 1)
    z[12:] *= -1
    check(["ntxent", "nscl", "supcon_in"], (z + 0.01 * normal(18, 4, seed=1)).float(), sample, sample % 3, temperature)


def test_logits_of_hundreds() -> None:
    """Rows that are not normalised, of sizes from 0.02 to 17."""
    size = 17 * torch.rand(18, 1, generator=torch.Generator().manual_seed(1)).double() ** 3
    unit = normal(18, 6)
    z = (unit / unit.norm(dim=1, keepdim=True) * size).float()
    assert check(list(FORMULAS), z, SAMPLE, CLASS, 0.5, normalize=False).flag() == 1


@pytest.mark.parametrize("t", (1 / 61, 1 / 84, 1 / 149))
def test_many_equal_rows_do_not_overflow(t: float) -> None:
    rows = torch.ones(256, 4, device=DEVICE)
    with launches() as ran:
        assert fastcl.dcl_loss(rows, rows, t).item() == pytest.approx(math.log(510), abs=1e-4)
    assert ran.flag() in (None, 0)


def test_a_row_weight_of_nothing() -> None:
    """No gradient where none comes; its row still serves as a candidate of others."""
    weights = row_weights(18)
    weights[[2, 5]] = 0
    x = leaf(normal(18, 6).float())
    with launches():
        rows = fastcl.contrastive_loss(x, SAMPLE.to(DEVICE), None, "ntxent", 0.2, "none")
        (grad,) = torch.autograd.grad((rows * weights.to(DEVICE)).sum(), x, retain_graph=True)
        (nothing,) = torch.autograd.grad((rows * 0).sum(), x)
    u = torch.nn.functional.normalize(x.detach().cpu().double()).requires_grad_()
    s = (u @ u.T / 0.2).fill_diagonal_(-torch.inf)
    wanted = ((s.logsumexp(1) - s[torch.arange(18), (torch.arange(18) + 9) % 18]) * weights.double()).sum()
    (want,) = torch.autograd.grad(wanted, u)
    norm = x.detach().cpu().double().norm(dim=1, keepdim=True)
    want = (want - u.detach() * (u.detach() * want).sum(1, keepdim=True)) / norm
    assert (grad.cpu().double() - want).norm() <= 1e-5 * want.norm() and grad[[2, 5]].any()
    assert not nothing.any()
