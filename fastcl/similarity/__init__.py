"""Representational similarity: CKA, RSA, drift, k-NN and Procrustes at any n, without storing a Gram matrix, and how
sure they are."""

from fastcl.similarity.accumulator import PairAccumulator
from fastcl.similarity.functions import linear_cka, pair_stats, rsa
from fastcl.similarity.layers import LayerCKA, layer_cka
from fastcl.similarity.measures import SIMILARITIES, Measure, similarity
from fastcl.similarity.neighbours import mutual_knn
from fastcl.similarity.ranks import SpearmanResult, spearman_rsa
from fastcl.similarity.results import AllPairs, PairResult
from fastcl.similarity.rotation import ProcrustesResult, procrustes
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.forms import GramSums
from fastcl.similarity.uncertainty.bootstrap import BootstrapInterval, bootstrap_interval, bootstrap_intervals
from fastcl.similarity.uncertainty.permutation import PermutationTest, permutation_test, permutation_tests

__all__ = [
    "SIMILARITIES", "AllPairs", "BootstrapInterval", "GramSums", "LayerCKA", "Measure", "PairAccumulator", "PairResult",
    "PairStats", "PermutationTest", "ProcrustesResult", "SpearmanResult", "bootstrap_interval", "bootstrap_intervals",
    "layer_cka", "linear_cka", "mutual_knn", "pair_stats", "permutation_test", "permutation_tests", "procrustes", "rsa",
    "similarity", "spearman_rsa",
]  # fmt: skip
