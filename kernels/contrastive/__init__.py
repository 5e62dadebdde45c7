"""Row statistics of contrastive losses: the kernels behind ``fastcl.row_stats``."""
