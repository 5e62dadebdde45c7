"""How sure a similarity is: permutation tests and bootstrap intervals."""
