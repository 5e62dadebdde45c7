"""The benchmark of the pair statistics."""
