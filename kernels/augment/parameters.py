"""Parameters of a view: one row of 32-bit words per view, written by the host and read by every kernel.

Integers are stored as such and real numbers as float32 bits, so that a single array takes a single transfer. Nothing
is drawn here: boxes and all other parameters are drawn in fastcl/data/plan.py.
"""

import triton
import triton.language as tl

IMAGE = tl.constexpr(0)
TOP = tl.constexpr(1)
LEFT = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
WIDTH = tl.constexpr(4)
FLIP = tl.constexpr(5)
COS = tl.constexpr(6)  # real: cosine of the rotation angle
SIN = tl.constexpr(7)  # real: its sine
BEFORE = tl.constexpr(8)  # number of the operations below that precede contrast
COUNT = tl.constexpr(9)  # number of operations
OPERATION = tl.constexpr(10)  # three words: operations in drawn order
FACTOR = tl.constexpr(13)  # three words, real: their factors
CONTRAST = tl.constexpr(16)  # real
GRAYSCALE = tl.constexpr(17)
SIGMA = tl.constexpr(18)  # real; 0: no blur
SOLARIZE = tl.constexpr(19)
COLUMNS = tl.constexpr(20)


@triton.jit
def whole(row, column):
    """Load an integer of a view's row."""
    return tl.load(row + column)


@triton.jit
def real(row, column):
    """Load a real number of a view's row."""
    return tl.load(row + column).to(tl.float32, bitcast=True)
