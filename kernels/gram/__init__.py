"""Triton kernels for pair statistics: moments of features, and tiles of two Gram matrices."""
