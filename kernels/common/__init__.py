"""What the kernels of all families share: launches, the table of tile sizes, arithmetic."""
