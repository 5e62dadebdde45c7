"""Fused contrastive losses, shared augmentations, and how self-supervised models align with supervised ones."""

from fastcl import interrupts  # noqa: F401  first: loading torch takes a second, in which Ctrl-C is pressed too

# isort: split
from fastcl.dispatch import backend, last_backend
from fastcl.errors import FastclError
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
from fastcl.rowstats.api import RowStats, normalize_rows, row_stats
from fastcl.similarity import (
    LayerCKA,
    PairAccumulator,
    PairStats,
    SpearmanResult,
    layer_cka,
    linear_cka,
    pair_stats,
    rsa,
    spearman_rsa,
)
from fastcl.similarity.two_models import TwinStats, twin_stats

__version__ = "0.2.0"

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
    "RowStats",
    "SpearmanResult",
    "SupConLoss",
    "TwinStats",
    "backend",
    "clip_loss",
    "contrastive_loss",
    "contrastive_losses",
    "dcl_loss",
    "last_backend",
    "layer_cka",
    "linear_cka",
    "normalize_rows",
    "nscl_loss",
    "ntxent_loss",
    "pair_stats",
    "row_stats",
    "rsa",
    "same_class_mass",
    "spearman_rsa",
    "supcon_loss",
    "twin_stats",
    "two_view_stats",
]
