"""Losses of other libraries on fastcl's kernels: their names, signatures, values and gradients, one module a library.

Import the loss from here in place of the library's own; docs/migration.md says what is identical and what is not. None
of the libraries has to be installed. Nothing here is imported by `import fastcl`.
"""
