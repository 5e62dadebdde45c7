"""Fused contrastive losses, shared augmentations, and how self-supervised models align with supervised ones."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from fastcl import interrupts  # noqa: F401  first, so that Ctrl-C is handled while torch loads (about a second)

__version__ = "0.2.0"

# If torch is already loaded, load everything now, which also registers the operators. The command line has not loaded
# torch, and does not need it to print help or to report invalid settings.
if TYPE_CHECKING or "torch" in sys.modules:
    from fastcl.public import *  # noqa: F403
    from fastcl.public import __all__ as __all__


def __getattr__(name: str) -> object:
    if name == "__all__" or not name.startswith("__"):
        public = import_module("fastcl.public")
        globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
        if name in globals():  # a public name, or a submodule that has just been loaded
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(import_module("fastcl.public").__all__))
