"""Measurements of the models during and after training."""
