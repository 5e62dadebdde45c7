"""The benchmark of the losses."""
