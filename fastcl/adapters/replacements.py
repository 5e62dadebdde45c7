"""What `fastcl.patch` puts in place of other libraries' methods, and the sources that it was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastcl.adapters import info_nce, lightly, open_clip
from fastcl.losses.queue import queue_loss
from fastcl.rowstats.api import normalize_rows

# By loss, the number of rows from which fastcl computes it on a CPU; with fewer the original does. From there on fastcl
# was never slower: bench/results/cpu/adapters.md, 128 columns. With fewer than 64 rows nothing was measured.
FEWEST = {"two views": 64, "one direction": 1024, "two directions": 128, "classes": 64, "queue": 256}


class Target(NamedTuple):
    """A method or a function that is replaced.

    Args:
        place: module:qualified name.
        ours: called with the arguments of the original; returns NotImplemented if the original has to compute.
        sources: what computes the value in the original, as names like `place`; the replaced function is one of them.
        digests: of those sources, by the releases that have them.
        hooks: methods that a subclass may override and that `ours` does not call; with an override the original
            computes.
        adapter: the module that `ours` imports when it is called, since it needs the library.
    """

    place: str
    ours: Callable[..., Any]
    sources: tuple[str, ...]
    digests: dict[str, str]
    hooks: tuple[str, ...] = ()
    adapter: str = ""


def worthwhile(kind: str, rows: Tensor) -> bool:
    """Whether fastcl computes a loss of this kind (`FEWEST`) of (N, D) rows."""
    return rows.device.type != "cpu" or len(rows) >= FEWEST[kind]


def _lightly_ntxent(self: Any, out0: Tensor, out1: Tensor) -> Any:
    if self.memory_bank.size[0] == 0:
        return lightly.NTXentLoss.forward(self, out0, out1) if worthwhile("two views", out0) else NotImplemented
    if not worthwhile("queue", out0) or out0.ndim != 2 or out0.shape != out1.shape:
        return NotImplemented
    u0, u1 = normalize_rows(out0), normalize_rows(out1)
    u1, bank = self.memory_bank(u1, update=out0.requires_grad)
    u0 = u0 if self.temperature > 0 else -u0
    return queue_loss(u0, u1, bank.T.to(u0.device), abs(self.temperature), normalize=False)


def _lightly_dcl(self: Any, out0: Tensor, out1: Tensor) -> Any:
    return lightly.DCLLoss.forward(self, out0, out1) if worthwhile("two views", out0) else NotImplemented


def _open_clip(
    self: Any, image_features: Tensor, text_features: Tensor, logit_scale: float | Tensor,
    logit_bias: float | Tensor | None = None, output_dict: bool = False,
) -> Any:  # fmt: skip
    if self.use_horovod or not worthwhile("two directions", image_features):
        return NotImplemented
    return open_clip.ClipLoss.forward(self, image_features, text_features, logit_scale, logit_bias, output_dict)


def _info_nce(
    query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None, *args: Any, **options: Any
) -> Any:
    if not worthwhile("one direction" if negative_keys is None else "queue", query):
        return NotImplemented
    return info_nce.info_nce(query, positive_key, negative_keys, *args, **options)


def _metric_learning(name: str) -> Callable[..., Any]:
    def ours(self: Any, embeddings: Tensor, *args: Any) -> Any:
        from fastcl.adapters import metric_learning  # which needs the library

        if not worthwhile("classes", embeddings):
            return NotImplemented
        found = metric_learning.computed(self, getattr(metric_learning, name).rows, embeddings, *args)
        return NotImplemented if found is None else found

    return ours


DISTRIBUTIONS = {
    "lightly": "lightly",
    "open_clip": "open-clip-torch",
    "info_nce": "info-nce-pytorch",
    "pytorch_metric_learning": "pytorch-metric-learning",
}
_CLIP = "open_clip.loss:ClipLoss."
_PML = "pytorch_metric_learning.losses."
_PAIRS = tuple(f"{_PML}generic_pair_loss:GenericPairLoss.{name}" for name in ("compute_loss", "mat_based_loss",
    "pair_based_loss"))  # fmt: skip
TARGETS: dict[str, tuple[Target, ...]] = {
    "lightly": (
        Target("lightly.loss.ntx_ent_loss:NTXentLoss.forward", _lightly_ntxent,
               ("lightly.loss.ntx_ent_loss:NTXentLoss.forward",),
               {"1.6.0": "c2fe35b380b7abbe", "1.5.23": "90dbb1e967200034"}),
        Target("lightly.loss.dcl_loss:DCLLoss.forward", _lightly_dcl,
               ("lightly.loss.dcl_loss:DCLLoss.forward", "lightly.loss.dcl_loss:DCLLoss._loss"),
               {"1.6.0 and 1.5.23": "79eda9174765df8d"}, ("_loss",)),
    ),
    "open_clip": (
        Target(_CLIP + "forward", _open_clip,
               (_CLIP + "forward", _CLIP + "get_logits", _CLIP + "get_ground_truth", "open_clip.loss:gather_features"),
               {"3.3.0 and 3.2.0": "166c422f18754b8d"}, ("get_logits", "get_ground_truth")),
    ),
    "info_nce": (Target("info_nce:info_nce", _info_nce, ("info_nce:info_nce", "info_nce:normalize"),
                        {"0.1.4": "e440d08d4d064c39"}),),
    "pytorch_metric_learning": tuple(
        Target(f"{_PML}{file}:{name}.compute_loss", _metric_learning(name),
               (*_PAIRS, f"{_PML}{file}:{name}._compute_loss"), {"2.9.0": newest, "2.8.1": before}, ("_compute_loss",),
               "fastcl.adapters.metric_learning")
        for file, name, newest, before in (
            ("ntxent_loss", "NTXentLoss", "dc24a6229451e3b9", "245febab1333ac1b"),
            ("supcon_loss", "SupConLoss", "92ca1637acfe8307", "c7a43656b3e16168"),
        )
    ),
}  # fmt: skip
