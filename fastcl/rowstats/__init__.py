"""Row statistics: what every contrastive loss is made of, on three backends.

The differentiable operators are registered with torch.library, so that torch.compile keeps them whole, and their
autograd at the operators' own key: an outer autograd.Function would fail `torch.library.opcheck`.
"""

from fastcl.rowstats import chunked_operator  # noqa: F401  (registers torch.ops.fastcl.row_stats)
from fastcl.rowstats.api import RowStats, normalize_rows, row_stats
from fastcl.rowstats.triton import operator, two_models_operator  # noqa: F401  (register fused and twin)

__all__ = ["RowStats", "normalize_rows", "row_stats"]
