"""The public names of the package; importing this module loads torch and everything else they need."""

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
from fastcl.losses.queue import queue_loss
from fastcl.micro import micro_step
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
    "micro_step",
    "normalize_rows",
    "nscl_loss",
    "ntxent_loss",
    "pair_stats",
    "queue_loss",
    "row_stats",
    "rsa",
    "same_class_mass",
    "spearman_rsa",
    "supcon_loss",
    "twin_stats",
    "two_view_stats",
]
