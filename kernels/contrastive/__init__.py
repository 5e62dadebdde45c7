"""Triton kernels behind ``fastcl.row_stats``: row statistics of contrastive losses and their gradients."""
