"""The sums over two Gram matrices that every measure is made of: by moments of the features or by tiles."""
