"""Code shared by all kernel families: launches, the table of tile sizes, arithmetic."""
