"""Representational similarity: CKA, debiased CKA, RSA and drift at any n, without storing a Gram matrix."""

from fastcl.similarity.accumulator import PairAccumulator
from fastcl.similarity.functions import linear_cka, pair_stats, rsa
from fastcl.similarity.layers import LayerCKA, layer_cka
from fastcl.similarity.ranks import SpearmanResult, spearman_rsa
from fastcl.similarity.results import AllPairs, PairResult
from fastcl.similarity.stats import PairStats
from fastcl.similarity.sums.forms import GramSums

__all__ = [
    "AllPairs", "GramSums", "LayerCKA", "PairAccumulator", "PairResult", "PairStats", "SpearmanResult", "layer_cka",
    "linear_cka", "pair_stats", "rsa", "spearman_rsa",
]  # fmt: skip
