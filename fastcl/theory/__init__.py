"""The bounds of arXiv 2510.08852 and its predecessor, 2506.04411, and the dynamics that they are about.

The bounds need no torch; the dynamics load it when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from fastcl.theory.corollaries import AlignmentBound, cka_coupling_bound, rsa_coupling_bound
from fastcl.theory.drift_bound import CouplingBound, DriftBound, largest_drift, similarity_coupling_bound
from fastcl.theory.few_shot_error import FewShotBound, few_shot_bound
from fastcl.theory.loss_gap import LossGapBound, loss_gap_bound
from fastcl.theory.parameter_bound import ParameterBound, parameter_divergence_bound
from fastcl.theory.softmax_gap import sampling_error, softmax_gap_bound

if TYPE_CHECKING:
    from fastcl.theory.descent import Descent, draw_batches, similarity_descent

__all__ = [
    "AlignmentBound",
    "CouplingBound",
    "Descent",
    "DriftBound",
    "FewShotBound",
    "LossGapBound",
    "ParameterBound",
    "cka_coupling_bound",
    "draw_batches",
    "few_shot_bound",
    "largest_drift",
    "loss_gap_bound",
    "parameter_divergence_bound",
    "rsa_coupling_bound",
    "sampling_error",
    "similarity_coupling_bound",
    "similarity_descent",
    "softmax_gap_bound",
]


def __getattr__(name: str) -> object:
    if name in ("Descent", "draw_batches", "similarity_descent"):
        return globals().setdefault(name, getattr(import_module("fastcl.theory.descent"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
