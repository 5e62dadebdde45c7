"""Losses of other libraries on fastcl's kernels: their names, signatures, values and gradients, one module a library.

Import the loss from here in place of the library's own; docs/migration.md says what is identical and what is not. The
libraries need not be installed, but for `metric_learning` and `sentence_transformers`, whose losses are subclasses.
Nothing here is imported by `import fastcl`.
"""
