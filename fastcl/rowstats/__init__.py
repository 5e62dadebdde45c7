"""Row statistics: what every contrastive loss is made of, on three backends."""

from fastcl.rowstats.api import RowStats, normalize_rows, row_stats

__all__ = ["RowStats", "normalize_rows", "row_stats"]
