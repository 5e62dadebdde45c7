"""Predicted times: a cycle model of the compiled kernels. Nothing here is measured."""
