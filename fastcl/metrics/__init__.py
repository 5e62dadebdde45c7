"""Metrics of one model's features (geometry, probes) and of two models' weights."""

from fastcl.metrics.geometry import cdnv, directional_cdnv
from fastcl.metrics.probes import ncc_accuracy
from fastcl.metrics.weights import weight_gap

__all__ = ["cdnv", "directional_cdnv", "ncc_accuracy", "weight_gap"]
