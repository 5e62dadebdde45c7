"""Row statistics, the building blocks of every contrastive loss, on three backends.

The differentiable operators are registered with torch.library, so that torch.compile does not trace into them. Their
derivatives are registered on the operators themselves: wrapping them in an autograd.Function would fail
`torch.library.opcheck`.
"""

from fastcl.rowstats import chunked_operator, log_sums, selves, sigmoid_sums  # noqa: F401  (register their operators)
from fastcl.rowstats.api import RowStats, normalize_rows, row_stats
from fastcl.rowstats.triton import operator, sigmoid_operator  # noqa: F401  (register their own)

__all__ = ["RowStats", "normalize_rows", "row_stats"]
