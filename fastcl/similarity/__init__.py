"""Representational similarity: CKA, debiased CKA, RSA and drifts of Gram matrices from one streaming pass."""

from fastcl.similarity.accumulator import PairAccumulator, PairResult, linear_cka, pair_stats, rsa
from fastcl.similarity.stats import GramSums, PairStats

__all__ = ["GramSums", "PairAccumulator", "PairResult", "PairStats", "linear_cka", "pair_stats", "rsa"]
