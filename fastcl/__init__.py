"""Fused contrastive losses, shared augmentations, and how self-supervised models align with supervised ones."""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from fastcl import interrupts  # noqa: F401  first, so that Ctrl-C is handled while torch loads (about a second)

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fastcl.public import *  # noqa: F403
    from fastcl.public import __all__ as __all__


def _load() -> ModuleType:
    """The public names; those of the losses are in the namespace of this module afterwards."""
    public = import_module("fastcl.public")
    globals().update({name: vars(public)[name] for name in public.__all__ if name in vars(public)})
    globals()["__all__"] = public.__all__
    return public


def __getattr__(name: str) -> object:
    if name == "__all__" or not name.startswith("__"):
        public = _load()
        if name in public.__all__:
            return globals().setdefault(name, getattr(public, name))
        if f"{__name__}.{name}" in public.LATER:
            return import_module(f"{__name__}.{name}")
        if name in globals():  # a submodule that has just been loaded, or __all__
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(import_module("fastcl.public").__all__))


# If torch is already loaded, load the losses now, which also registers their operators. The command line has not loaded
# torch, and does not need it to print help or to report invalid settings.
if "torch" in sys.modules:
    _load()
if os.environ.get("FASTCL_PATCH"):
    import_module("fastcl.adapters.patching").patch_from_environment()
