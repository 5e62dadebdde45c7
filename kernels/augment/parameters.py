"""One row of 32-bit words for each view: what a view is made from. The host writes it, every kernel reads it.

Integers stand as they are, real numbers as the bits of their float32, so one array carries both in one transfer.
"""

import triton
import triton.language as tl

IMAGE = tl.constexpr(0)
TOP = tl.constexpr(1)
LEFT = tl.constexpr(2)
HEIGHT = tl.constexpr(3)
WIDTH = tl.constexpr(4)
FLIP = tl.constexpr(5)
COS = tl.constexpr(6)  # real, of the angle; so SIN
SIN = tl.constexpr(7)
BEFORE = tl.constexpr(8)  # how many of the operations below come before contrast
COUNT = tl.constexpr(9)  # how many there are
OPERATION = tl.constexpr(10)  # three, in their drawn order
FACTOR = tl.constexpr(13)  # real, theirs
CONTRAST = tl.constexpr(16)  # real
GRAYSCALE = tl.constexpr(17)
SIGMA = tl.constexpr(18)  # real, 0 is no blur
SOLARIZE = tl.constexpr(19)
COLUMNS = tl.constexpr(20)


@triton.jit
def whole(row, column):
    """An integer of a view's row."""
    return tl.load(row + column)


@triton.jit
def real(row, column):
    """A real number of a view's row."""
    return tl.load(row + column).to(tl.float32, bitcast=True)
