"""The losses as their papers write them, in float64: a matrix of logits, a mask for each set of rows, plain autograd.

Nothing here comes from the package under test. A row without a positive or without a negative counts as 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tolerance(NamedTuple):
    """Allowed errors, and the unit roundoff of the arithmetic they belong to."""

    loss: float  # relative to |loss| + sum over pairs of |d loss / d logit| * |x_i| |y_j| / temperature
    gradient: float  # relative to |attraction| + |repulsion|, Euclidean norms over all rows
    unit: float


# Half-precision rows are computed in float32 and compared with the formula on the same rounded rows; their gradients
# may also differ by the rounding of their own dtype.
_FLOAT32 = Tolerance(loss=1e-6, gradient=1e-5, unit=2.0**-24)
TOLERANCE: dict[torch.dtype | str, Tolerance] = {
    torch.float64: Tolerance(loss=1e-12, gradient=1e-11, unit=2.0**-53),
    torch.float32: _FLOAT32,
    torch.bfloat16: _FLOAT32,
    torch.float16: _FLOAT32,
    # Precisions of the Triton backend. Half precision moves the entries of unit rows, and the logits in proportion to
    # 1 / temperature: the bounds of "fp16" and "bf16" are for rows of 24 columns and more, where that averages out.
    "fp32": _FLOAT32,
    "fp16": Tolerance(loss=1e-4, gradient=2e-3, unit=2.0**-11),
    "bf16": Tolerance(loss=1e-3, gradient=1e-2, unit=2.0**-8),
}
# Logits of size |x_i| |y_j| / temperature are known to no better than a few units in their last place. What that alone
# does to a gradient (`Truth.blur`) bounds every implementation; it exceeds the table only where attraction and
# repulsion cancel pair by pair (SupCon with collapsed classes).
BLUR_FACTOR = 4
# Probes against scikit-learn: fractions of rows, and weights of a logistic regression on standardised features.
PROBE_ACCURACY, PROBE_WEIGHTS = 1e-3, 5e-3
NOISE = 2.0**-48  # what the formulas below lose to their own subtractions in float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Masks(NamedTuple):
    """(N, M) masks: which candidate stands in which relation to which anchor."""

    view: Tensor
    peer: Tensor
    other: Tensor


def masks(
    sample: Tensor, labels: Tensor | None = None, sample_y: Tensor | None = None, labels_y: Tensor | None = None,
    self_y: Tensor | None = None,
) -> Masks:  # fmt: skip
    """Relations by comparing ids pair by pair; a label of -1 equals no label, its own included."""
    columns = sample if sample_y is None else sample_y
    same_sample = sample.view(-1, 1) == columns.view(1, -1)
    same_class = torch.zeros_like(same_sample)
    if labels is not None:
        labels_y = labels if sample_y is None else labels_y
        same_class = (labels.view(-1, 1) == labels_y.view(1, -1)) & (labels.view(-1, 1) != -1)
    view = same_sample.clone()
    if sample_y is None:
        view.fill_diagonal_(False)
    if self_y is not None:
        view &= self_y.view(-1, 1) != torch.arange(len(columns))
    return Masks(view, same_class & ~same_sample, ~same_class & ~same_sample)


Formula = Callable[[Tensor, Masks], tuple[Tensor, Tensor, Tensor]]  # row losses, masks of positives and negatives


def sum_exp(s: Tensor, mask: Tensor) -> Tensor:
    """Row sums of exp(s) over a mask; 1 for an empty row, so that its logarithm exists."""
    return torch.where(mask.any(1), (s.exp() * mask).sum(1), 1)


def mean(s: Tensor, mask: Tensor) -> Tensor:
    """Row means of s over a mask; 0 for an empty row."""
    return (s * mask).sum(1) / mask.sum(1).clamp(min=1)


def ntxent(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """SimCLR."""
    negatives = m.peer | m.other
    return sum_exp(s, m.view | negatives).log() - mean(s, m.view), m.view, negatives


def dcl(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Decoupled: no positive in the denominator; the CL of arXiv 2510.08852."""
    negatives = m.peer | m.other
    return sum_exp(s, negatives).log() - mean(s, m.view), m.view, negatives


def nscl(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """arXiv 2510.08852: other classes alone in the denominator."""
    return sum_exp(s, m.other).log() - mean(s, m.view), m.view, m.other


def nscl_with_positive(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """The published code of arXiv 2510.08852: views and other classes in the denominator."""
    return sum_exp(s, m.view | m.other).log() - mean(s, m.view), m.view, m.other


def supcon(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Khosla et al. 2020, eq. 2 (L_out)."""
    positives = m.view | m.peer
    return sum_exp(s, positives | m.other).log() - mean(s, positives), positives, m.other


def supcon_in(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """Khosla et al. 2020, eq. 3 (L_in)."""
    positives = m.view | m.peer
    share = sum_exp(s, positives) / positives.sum(1).clamp(min=1) / sum_exp(s, positives | m.other)
    return -share.log(), positives, m.other


def supcon_negatives(s: Tensor, m: Masks) -> tuple[Tensor, Tensor, Tensor]:
    """SupCon with other classes alone in the denominator."""
    positives = m.view | m.peer
    return sum_exp(s, m.other).log() - mean(s, positives), positives, m.other


FORMULAS = {f.__name__: f for f in (ntxent, dcl, nscl, nscl_with_positive, supcon, supcon_in, supcon_negatives)}


def row_losses(formula: str | Formula, m: Masks) -> Callable[[Tensor], Tensor]:
    """Function from logits to (N,) row losses, 0 for rows that lack a positive or a negative."""
    of = FORMULAS[formula] if isinstance(formula, str) else formula

    def rows(s: Tensor) -> Tensor:
        loss, positives, negatives = of(s, m)
        return torch.where(positives.any(1) & negatives.any(1), loss, 0)

    return rows


@dataclass(frozen=True)
class Truth:
    """Values and gradients of sum_i weights_i rows_i, with what their errors are measured against."""

    rows: Tensor  # (N,)
    row_scale: Tensor  # (N,)
    row_blur: Tensor  # (N,)
    loss: Tensor  # ()
    loss_scale: Tensor  # ()
    loss_blur: Tensor  # ()
    grads: tuple[Tensor, ...]  # of x, and of y where given
    grad_scales: tuple[Tensor, ...]
    blurs: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]  # (N, 1): gradients are compared after multiplication by the norm of their row
    grad_temperature: Tensor
    temperature_scale: Tensor
    temperature_blur: Tensor


def unit_rows(x: Tensor) -> Tensor:
    """x / |x|; a zero row stays zero and has no gradient."""
    norm = x.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, x, 0) / torch.where(norm > 0, norm, 1)


def solve(
    rows_of: Callable[[Tensor], Tensor],
    x: Tensor,
    temperature: float,
    y: Tensor | None = None,
    weights: Tensor | None = None,
    normalize: bool = True,
    subtracts: bool = False,
) -> Truth:
    """Truth about row losses `rows_of(logits)` for arithmetic in x's dtype; weights default to the mean.

    `subtracts`: the loss is a difference of two statistics of the logits' size even where the logits leave no trace.
    """
    unit = TOLERANCE[x.dtype].unit
    leaves = [v.detach().double().requires_grad_() for v in (x, y) if v is not None]
    t = torch.tensor(float(temperature), dtype=torch.float64, requires_grad=True)
    u = [unit_rows(v) if normalize else v for v in leaves]
    s = u[0] @ u[-1].T / t
    s.retain_grad()
    rows = rows_of(s)
    weights = torch.full_like(rows, 1 / len(rows)) if weights is None else weights.double()
    loss = (weights * rows).sum()
    loss.backward()
    g = s.grad if s.grad is not None else torch.zeros_like(s)
    flat = [v.detach() for v in u]

    def pulled(g: Tensor) -> list[Tensor]:
        if y is None:
            return [(g + g.T) @ flat[0] / float(temperature)]
        return [g @ flat[1] / float(temperature), g.T @ flat[0] / float(temperature)]

    scales = [a.norm() + b.norm() for a, b in zip(pulled(g.clamp(max=0)), pulled(g.clamp(min=0)), strict=True)]
    size = flat[0].norm(dim=1)[:, None] * flat[-1].norm(dim=1) / float(temperature)
    signs = torch.randint(0, 2, s.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = (s.detach() + signs * unit * size).requires_grad_()
    moved_loss = (weights * rows_of(moved)).sum()
    blur = torch.autograd.grad(moved_loss, moved)[0] - g if moved_loss.requires_grad else g
    # The formulas subtract numbers of the size of their weights from each other.
    noise = NOISE * weights.sum() * max(v.norm(dim=1).amax() for v in flat) / float(temperature)
    row_blur = ((BLUR_FACTOR * unit if subtracts else 0) + NOISE) * size.amax(1)
    row_scale = rows.detach().abs() + (g.abs() * size).sum(1) / weights
    return Truth(
        rows.detach(),
        row_scale,
        row_blur,
        loss.detach(),
        (weights * row_scale).sum(),
        (weights * row_blur).sum(),
        tuple(v.grad for v in leaves),
        tuple(scales),
        tuple(b.norm() * BLUR_FACTOR + noise for b in pulled(blur)),
        tuple(v.detach().norm(dim=1, keepdim=True) if normalize else torch.ones(len(v), 1) for v in leaves),
        t.grad if t.grad is not None else torch.zeros_like(t),
        (g.abs() * size).sum() / float(temperature),
        ((blur.abs() * size).sum() * BLUR_FACTOR + NOISE * size.amax() * weights.sum()) / float(temperature),
    )


def clip_formula(s: Tensor) -> Tensor:
    """CLIP's rows: the mean of the cross-entropies along row i and along column i, the diagonal being the target."""
    return (s.exp().sum(1).log() + s.exp().sum(0).log()) / 2 - s.diagonal()


def assert_rows(got: Tensor, truth: Truth, dtype: torch.dtype | str) -> None:
    """Row losses agree with the formula's."""
    error = (got.detach().double() - truth.rows).abs()
    bound = TOLERANCE[dtype].loss * truth.row_scale + truth.row_blur
    assert (error <= bound).all(), f"row {(error / bound).argmax()}: largest error / bound {(error / bound).max()}"


def assert_loss(got: Tensor, truth: Truth, dtype: torch.dtype | str) -> None:
    """The weighted loss agrees with the formula's."""
    error = (got.detach().double() - truth.loss).abs()
    bound = TOLERANCE[dtype].loss * truth.loss_scale + truth.loss_blur
    assert error <= bound, f"loss {got.item()} against {truth.loss.item()}: error {error:.2e}, bound {bound:.2e}"


def assert_gradients(got: Sequence[Tensor], truth: Truth, precision: str | None = None) -> None:
    """Gradients of the rows agree with the formula's; without a precision they were computed as their dtype is."""
    assert len(got) == len(truth.grads)
    wanted = zip(truth.grads, truth.grad_scales, truth.blurs, truth.sizes, strict=True)
    for grad, (want, scale, blur, size) in zip(got, wanted, strict=True):
        tolerance, info = TOLERANCE[precision or grad.dtype], torch.finfo(grad.dtype)
        error = (grad.double() - want).abs()
        if info.bits == 16:
            error = (error - info.eps / 2 * want.abs() - info.tiny * info.eps).clamp(min=0)
        error = (error * size).norm()
        bound = tolerance.gradient * scale + blur
        assert error <= bound, f"gradient: error {error:.2e}, bound {bound:.2e}, of which blur {blur:.2e}"


def assert_temperature(got: Tensor, truth: Truth, dtype: torch.dtype | str) -> None:
    """The gradient of the temperature agrees with the formula's."""
    error = (got.double() - truth.grad_temperature).abs().squeeze()
    bound = TOLERANCE[dtype].gradient * truth.temperature_scale + truth.temperature_blur
    want = truth.grad_temperature.item()
    assert error <= bound, f"d temperature {got.item()} against {want}: error {error:.2e}, bound {bound:.2e}"


@contextmanager
def small_tiles(chunked: ModuleType, rows: int, columns: int) -> Iterator[list[bool]]:
    """Inside, the chunked backend (its module is passed) works in tiles of this size, few rows too. Yields the list
    to which each pass appends whether it took the bounded path."""
    paths: list[bool] = []
    is_bounded = chunked._is_bounded

    def recorded(xs: Tensor, ys: Tensor) -> bool:
        paths.append(is_bounded(xs, ys))
        return paths[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "TILE", {"cpu": (rows, columns)})
        patch.setattr(chunked, "VIEW_ELEMENTS", 64 * rows)
        patch.setattr(chunked, "WHOLE", 0)
        patch.setattr(chunked, "_is_bounded", recorded)
        yield paths
