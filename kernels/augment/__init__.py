"""Triton kernels of augmented views: from uint8 images on the device to normalised float32 views."""
