"""Triton kernels that turn uint8 images on the device into augmented, normalised float32 views."""
