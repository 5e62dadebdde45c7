"""Sums over two Gram matrices, from which all measures follow: by moments of the features or by tiles."""
