"""The public names of the package.

Importing this module loads torch, the losses and the row statistics, and registers their operators. Names that no loss
needs load their own modules when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastcl.dispatch import backend, last_backend
from fastcl.errors import FastclError
from fastcl.losses.explicit import explicit_pairs_loss, paired_negatives, with_margin
from fastcl.losses.functional import (
    clip_loss,
    contrastive_loss,
    contrastive_losses,
    dcl_loss,
    nscl_loss,
    ntxent_loss,
    supcon_loss,
    two_view_stats,
)
from fastcl.losses.modules import CLIPLoss, DCLLoss, NSCLLoss, NTXentLoss, SupConLoss
from fastcl.losses.objectives import OBJECTIVES, Objective, same_class_mass
from fastcl.losses.queue import queue_loss
from fastcl.losses.sigmoid import sigmoid_loss
from fastcl.rowstats.api import RowStats, normalize_rows, row_stats

if TYPE_CHECKING:
    from fastcl.adapters.patching import patch
    from fastcl.micro import micro_step
    from fastcl.similarity import (
        LayerCKA,
        PairAccumulator,
        PairStats,
        ProcrustesResult,
        SpearmanResult,
        layer_cka,
        linear_cka,
        mutual_knn,
        pair_stats,
        procrustes,
        rsa,
        spearman_rsa,
    )
    from fastcl.similarity.two_models import TwinStats, twin_stats

__all__ = [
    "OBJECTIVES",
    "CLIPLoss",
    "DCLLoss",
    "FastclError",
    "LayerCKA",
    "NSCLLoss",
    "NTXentLoss",
    "Objective",
    "PairAccumulator",
    "PairStats",
    "ProcrustesResult",
    "RowStats",
    "SpearmanResult",
    "SupConLoss",
    "TwinStats",
    "backend",
    "clip_loss",
    "contrastive_loss",
    "contrastive_losses",
    "dcl_loss",
    "explicit_pairs_loss",
    "last_backend",
    "layer_cka",
    "linear_cka",
    "micro_step",
    "mutual_knn",
    "normalize_rows",
    "nscl_loss",
    "ntxent_loss",
    "pair_stats",
    "paired_negatives",
    "patch",
    "procrustes",
    "queue_loss",
    "row_stats",
    "rsa",
    "same_class_mass",
    "sigmoid_loss",
    "spearman_rsa",
    "supcon_loss",
    "twin_stats",
    "two_view_stats",
    "with_margin",
]

LATER = {
    "fastcl.adapters.patching": ("patch",),
    "fastcl.micro": ("micro_step",),
    "fastcl.similarity": (
        "LayerCKA", "PairAccumulator", "PairStats", "ProcrustesResult", "SpearmanResult", "layer_cka", "linear_cka",
        "mutual_knn", "pair_stats", "procrustes", "rsa", "spearman_rsa",
    ),
    "fastcl.similarity.two_models": ("TwinStats", "twin_stats"),
}  # fmt: skip


def __getattr__(name: str) -> object:
    for module, names in LATER.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(module), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
