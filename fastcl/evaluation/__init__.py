"""Evaluation of frozen features: linear probe, nearest neighbours, nearest class centre, few shots."""

from fastcl.evaluation.few_shot import few_shot_probe
from fastcl.evaluation.findings import Evaluation, FewShotProbe, KNNProbe, LinearProbe, NCCProbe, Spread
from fastcl.evaluation.linear import linear_probe
from fastcl.evaluation.nearest import knn_probe
from fastcl.evaluation.suite import PROBES, ProbeSettings, evaluate, ncc_probe

__all__ = [
    "PROBES",
    "Evaluation",
    "FewShotProbe",
    "KNNProbe",
    "LinearProbe",
    "NCCProbe",
    "ProbeSettings",
    "Spread",
    "evaluate",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "ncc_probe",
]
