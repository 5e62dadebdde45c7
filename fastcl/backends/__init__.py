"""Implementations of the row statistics. Each takes rows whose logits are plain inner products."""
