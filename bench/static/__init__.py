"""The gate on compiled kernels."""
