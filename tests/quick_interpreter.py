"""Triton's interpreter without work that it repeats."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace two functions of the interpreter by ones with the same results.

    At every call of a function within a kernel it looks through its language for builtins to replace, all of which the
    launch has replaced already; and it builds the table of numpy's types anew for every operation.
    """
    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton
        return
    patch_lang = interpreter._patch_lang

    def patch_what_is_left(fn: Callable) -> interpreter._LangPatchScope:
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return patch_lang(fn)
        return interpreter._LangPatchScope()

    of_scalar = lru_cache(interpreter._get_np_dtype)

    def numpy_type(kind: tl.dtype) -> np.dtype:
        scalar = kind.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else of_scalar(scalar)

    interpreter._patch_lang = patch_what_is_left
    interpreter._get_np_dtype = numpy_type
