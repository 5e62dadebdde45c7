"""What a pair of rows adds to the sum of a row, from its logit in units of log2.

    exponential   e^l                    of log-sum-exps
    softplus      log(1 + e^l)           of the sigmoid loss
    sigmoid       1 / (1 + e^-l)         its derivative

No logit overflows the last two, and a small term keeps its digits: log(1 + e) is a polynomial times e, since its
logarithm would lose those of an e below 2^-24.
"""

import triton
import triton.language as tl

from ..common.numerics import LN2


@triton.jit
def _log1p(b_e):
    """log(1 + e) for 0 <= e <= 1: e times a polynomial, whose relative error is 3e-8 before rounding."""
    b_p = b_e * 0.0052326879105208945 - 0.029505213317385592
    b_p = b_p * b_e + 0.07822591041996776
    b_p = b_p * b_e - 0.13663242278141724
    b_p = b_p * b_e + 0.1910600510733078
    b_p = b_p * b_e - 0.24842981791207833
    b_p = b_p * b_e + 0.3331909675447092
    b_p = b_p * b_e - 0.49999493137933104
    b_p = b_p * b_e + 0.9999999698793594
    return b_p * b_e


@triton.jit
def term(b_x, TERM: tl.constexpr):
    """The term of each pair; b_x: logits in units of log2, minus the shift."""
    if TERM == "softplus":
        b_t = tl.maximum(b_x, 0.0) * LN2 + _log1p(tl.exp2(-tl.abs(b_x)))
    elif TERM == "sigmoid":
        b_t = 1.0 / (1.0 + tl.exp2(-b_x))
    else:
        b_t = tl.exp2(b_x)
    return b_t
