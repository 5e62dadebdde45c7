"""The benchmark of the data part."""
