"""The static gate on compiled kernels."""
