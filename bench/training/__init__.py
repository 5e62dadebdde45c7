"""The benchmark of the trainer."""
