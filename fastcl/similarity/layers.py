"""CKA between all layers of two models in one pass over a loader: the minibatch CKA of Nguyen et al. 2021.

For each batch of b samples the unbiased HSIC_1 (Song et al. 2012) of every pair of layers is computed; CKA is the ratio
of its means over the batches,

    CKA(k, l) = mean HSIC_1(K, L) / sqrt(mean HSIC_1(K, K) mean HSIC_1(L, L)).

HSIC_1 is an inner product. With K~ the Gram matrix without its diagonal, k = K~1 and t = 1'k, let

    U(K)_ij = K_ij - (k_i + k_j) / (b - 2) + t / ((b - 1)(b - 2))  for i != j,  U(K)_ii = 0

(Szekely and Rizzo 2014): its rows sum to zero, and HSIC_1(K, L) = <U(K), U(L)> / (b (b - 3)). So with the matrices U of
all layers as rows of length b^2, the whole table of a batch is one matrix product. Only Gram matrices are kept: 8 b^2
bytes of memory per layer, whatever its width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fastcl.checks import check_not_meta
from fastcl.dispatch import choose_torch
from fastcl.errors import FastclError, suggest
from fastcl.rowstats.pair_sums import PairSums
from fastcl.similarity.progress import counted
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.forms import ADDITIVE, ratio_table

_COLUMNS = 1 << 16  # columns of a layer's output converted to float64 at a time


@dataclass(frozen=True)
class LayerCKA:
    """CKA of all layers of one model with all layers of another.

    Attributes:
        names_a: names of the first model's layers, in the order in which its forward pass finishes them.
        names_b: the same for the second model.
        matrix: (len(names_a), len(names_b)) float64 on the CPU, entries at most 1 (and possibly slightly below 0 for
            unrelated layers: the estimator is unbiased); NaN where either layer is undefined.
        batches: number of batches.
        samples: number of samples in all batches.
        left_out: modules that matched but gave no (b, ...) tensor in the first forward pass, or were not called.
        undefined_a: layers of the first model for which CKA is undefined, each with the first such batch and why.
        undefined_b: the same for the second model.
    """

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    matrix: Tensor
    batches: int
    samples: int
    left_out: tuple[str, ...] = ()
    undefined_a: Mapping[str, str] = field(default_factory=dict)
    undefined_b: Mapping[str, str] = field(default_factory=dict)


def layer_cka(
    model_a: nn.Module,
    model_b: nn.Module,
    loader: Iterable[Tensor | Sequence[Any]],
    layers_a: str | Sequence[str] = "*",
    layers_b: str | Sequence[str] | None = None,
    *,
    progress: bool = False,
) -> LayerCKA:
    """Minibatch CKA (Nguyen et al. 2021, with the unbiased HSIC_1) between the layers of two models.

    A layer is a module; its features are its output on a batch, (b, ...) flattened to (b, d): the first tensor of a
    tuple, list or dict, and the last call if a module is called several times. They are read as soon as the module
    returns, before an in-place ReLU can change them. Gram matrices are float64, whatever the models' dtype.

    Both models run in evaluation mode, without gradients, on the device of their parameters, to which batches are
    moved. Training flags are restored and hooks removed at the end, even after an exception.

    Args:
        model_a: called with a batch of images.
        model_b: the same; may be `model_a` (self-similarity), which then runs once per batch.
        loader: batches of images, or tuples and lists whose first item is one. Each needs at least 4 samples; all
            batches weigh the same. The value depends on the batch size only through the estimator's noise.
        layers_a: one or several patterns for the names in `model_a.named_modules()`. As in file paths, * stays within
            one level: "*" matches the top-level modules, "layer*.*" the blocks of a ResNet, "**" all modules,
            "**.attn" those named attn at any depth; "layer1.0" is one module.
        layers_b: the same for `model_b`; None: `layers_a`.
        progress: show a tqdm bar if standard error is a terminal.

    Returns:
        The table with the names of its rows and columns. A layer whose outputs are constant over a batch, or whose
        pairs of samples are all equally similar, up to rounding, is undefined, as for `PairStats.cka_debiased`; the
        other layers keep their values.

    Raises:
        FastclError: a pattern that matches no module (with the nearest name), no matched module that gives a (b, ...)
            tensor, a batch that is not a tensor or has fewer than 4 samples, an empty loader, layers whose number of
            rows is not the batch's or whose values are not finite.
    """
    patterns_a = (layers_a,) if isinstance(layers_a, str) else tuple(layers_a)
    patterns_b = patterns_a if layers_b is None else (layers_b,) if isinstance(layers_b, str) else tuple(layers_b)
    wanted_a, wanted_b = match_layers(model_a, patterns_a, "layers_a"), match_layers(model_b, patterns_b, "layers_b")
    if model_a is model_b:
        recorders = [_Recorder(model_a, [*dict.fromkeys(wanted_a + wanted_b)])] * 2
    else:
        recorders = [_Recorder(model_a, wanted_a), _Recorder(model_b, wanted_b)]
    return _measure(recorders, [wanted_a, wanted_b], counted(loader, None, "layer CKA", progress, "batch"))


def _measure(recorders: list[_Recorder], wanted: list[list[str]], loader: Iterable[Any]) -> LayerCKA:
    """Run the loader through both recorders, which are the same object if the models are."""
    sums, names, batches, samples = None, [], 0, 0
    # Not inference_mode: tensors that a model caches in its forward pass must stay usable in training.
    with ExitStack() as stack, torch.no_grad():
        for recorder in dict.fromkeys(recorders):
            stack.enter_context(recorder.recording())
        for batch in loader:
            images = _images(batch, batches)
            for recorder in dict.fromkeys(recorders):
                recorder.run(images)
            if sums is None:
                asked = zip(recorders, wanted, ("layers_a", "layers_b"), strict=True)
                names = [recorder.given(layers, argument) for recorder, layers, argument in asked]
            table = _table(*(r.stacked(kept, batches) for r, kept in zip(recorders, names, strict=True)), len(images))
            sums = table if sums is None else [total + value for total, value in zip(sums, table, strict=True)]
            batches, samples = batches + 1, samples + len(images)
    if sums is None:
        raise FastclError("loader yielded no batches")
    choose_torch()
    matrix = ratio_table(*(value.cpu() for value in sums))
    lost = [name for asked, kept in zip(wanted, names, strict=True) for name in asked if name not in kept]
    undefined = [
        {name: recorder.undefined[name] for name in kept if name in recorder.undefined}
        for recorder, kept in zip(recorders, names, strict=True)
    ]
    return LayerCKA(tuple(names[0]), tuple(names[1]), matrix, batches, samples, tuple(dict.fromkeys(lost)), *undefined)


def match_layers(model: nn.Module, patterns: Sequence[str], argument: str) -> list[str]:
    """Names of the modules that the patterns of `layer_cka` match.

    Raises:
        FastclError: a pattern that matches nothing, or no pattern; the message names the argument.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        matched = [name for name in names if _matches(name.split("."), pattern.split("."))]
        if not matched:
            near = suggest(pattern, names) if len(names) <= 20 else suggest(pattern, names).partition("; expected")[0]
            raise FastclError(f"{argument}: {pattern!r} matches none of {len(names)} modules{near}")
        found += matched
    if not found:
        raise FastclError(f"{argument} is empty: give at least one pattern, such as '*'")
    return list(dict.fromkeys(found))


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[k:], pattern[1:]) for k in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _images(batch: Tensor | Sequence[Any], at: int) -> Tensor:
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor) or images.ndim == 0:
        raise FastclError(
            f"batch {at} of loader must be a tensor or a tuple whose first item is one, got {type(images).__name__}"
        )
    if len(images) < 4:
        raise FastclError(
            f"batch {at} of loader has {len(images)} samples; HSIC_1 needs at least 4 (drop_last=True drops a "
            "short last batch)"
        )
    return images


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        return next((tensor for tensor in map(_first_tensor, output) if tensor is not None), None)
    return output if isinstance(output, Tensor) else None


class _Recorder:
    """One model and the matrices U of its layers on the latest batch."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        place = next(chain(model.parameters(), model.buffers()), None)
        self.device = None if place is None else place.device
        self.matrices: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.undefined: dict[str, str] = {}
        self.rows = 0

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Set evaluation mode and hooks; undo both at the end."""
        modes = {module: module.training for module in self.model.modules()}
        modules = dict(self.model.named_modules())
        hooks = []
        try:
            self.model.eval()
            hooks += [modules[name].register_forward_hook(partial(self._keep, name)) for name in self.names]
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module, training in modes.items():
                module.training = training

    def run(self, images: Tensor) -> None:
        self.matrices, self.rows = {}, len(images)
        self.model(images if self.device is None else images.to(self.device, non_blocking=True))

    def _keep(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        # Compute it now: a later module may modify this output in place.
        x = _first_tensor(output)
        self.matrices.pop(name, None)
        if x is not None and x.ndim >= 2 and len(x) == self.rows and x.is_floating_point() and x.numel():
            self.matrices[name], self.sums[name] = _u_centred_gram(x.flatten(1))

    def given(self, names: list[str], argument: str) -> list[str]:
        """The names that gave a matrix, in the order of the forward pass."""
        kept = [name for name in self.matrices if name in names]
        if not kept:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise FastclError(
                f"{argument}: none of {len(names)} matched modules ({shown}) is called in the forward pass and gives "
                f"a float tensor of shape ({self.rows}, ...)"
            )
        return kept

    def stacked(self, names: list[str], batch: int) -> Tensor:
        """The matrices U of some layers as rows, (len(names), b^2) float64; NaN where CKA is undefined."""
        for name in names:
            if name not in self.matrices:
                raise FastclError(f"layer {name!r} gave no float tensor of shape ({self.rows}, ...) on batch {batch}")
        stack = torch.stack([self.matrices[name] for name in names]).flatten(1)
        check_not_meta(stack, f"outputs of layer {names[0]!r}")
        sums = torch.stack([self.sums[name] for name in names])
        finite = stack.isfinite().all(dim=1) & sums.isfinite().all(dim=1)
        if not finite.all():
            name = names[int(finite.logical_not().nonzero()[0])]
            raise FastclError(f"outputs of layer {name!r} are not finite (or too large for float64) on batch {batch}")
        for k, (name, values) in enumerate(zip(names, sums.tolist(), strict=True)):
            try:
                form = PairStats.unpacked(self.rows, "linear", values).hsic1_form()
                form.self_term("first", f"CKA of layer {name!r}", ADDITIVE)
            except FastclError as error:
                self.undefined.setdefault(name, f"batch {batch}: {error}")
                stack[k] = torch.nan
        return stack


def _u_centred_gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """U(K), (b, b) float64, for (b, d) outputs, and the (18,) values of `PairStats.unpacked` for (K, K)."""
    b = len(x)
    gram = x.new_zeros(b, b, dtype=torch.float64)
    margins, shift = gram.new_zeros(b), gram.new_zeros(())
    for columns in x.split(_COLUMNS, dim=1):
        columns = columns.double()
        mean = columns.mean(dim=0)
        columns = columns - mean  # leaves U unchanged and avoids cancellation when the mean is large
        gram.addmm_(columns, columns.mT)
        margins += columns @ mean
        shift += mean @ mean
    squares = gram.diagonal().clone()
    gram.fill_diagonal_(0)
    inner = gram.square().sum().expand(3)
    sums = PairSums.of_centred(inner, (squares,) * 2, (margins,) * 2, (shift,) * 2).packed()
    rows = gram.sum(dim=1)
    shift = rows / (b - 2) - rows.sum() / (2 * (b - 1) * (b - 2))
    gram -= shift[:, None] + shift
    return gram.fill_diagonal_(0), sums


def _table(a: Tensor, b: Tensor, n: int) -> list[Tensor]:
    """HSIC_1 of all pairs of layers, and of each layer with itself, on one batch of n samples."""
    b = b.to(a.device)
    # The self-terms also use whole-stack products, so that equal layers go through the same arithmetic in all three.
    return [v / (n * (n - 3)) for v in (a @ b.mT, (a @ a.mT).diagonal(), (b @ b.mT).diagonal())]
