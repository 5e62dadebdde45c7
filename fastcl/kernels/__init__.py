"""The Triton kernels, one package per family.

Their sources lie in the checkout's top-level folder ``kernels/``. A wheel brings them along as
``fastcl/kernels/<family>``; in a checkout or an editable install they are found through this package's path.
"""

from pathlib import Path

_sources = Path(__file__).resolve().parents[2] / "kernels"
# Beside an installed fastcl that folder can only be another project's package `kernels`, which has an __init__.py.
if _sources.is_dir() and not (_sources / "__init__.py").exists():
    __path__.append(str(_sources))
