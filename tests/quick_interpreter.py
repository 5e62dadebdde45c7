"""Triton's interpreter without work that it repeats."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    """Replace functions of the interpreter, and of the language below it, by ones with the same results.

    At every call of a function within a kernel the interpreter looks through its language for builtins to replace, all
    of which the launch has replaced already; it builds the table of numpy's types anew for every operation; and most of
    its time goes into types, of which a kernel has few: they are made, compared and checked for every operation.
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

    wrapper = tl.core.builtin(install).__code__

    def patch_attr(obj: object, name: str, member: Callable, builder: object, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch_attr
    interpreter._patch_lang = patch_what_is_left
    interpreter._get_np_dtype = numpy_type
    _share_types()
    _skip_checks_of_equal_types()
    options = interpreter.interpreter_builder.options
    if not options.debug:  # then the interpreter computes whether integers overflow, and asserts nothing
        object.__setattr__(options, "sanitize_overflow", False)


def _share_types() -> None:
    """One object for equal types of blocks, which knows what every tensor of its type holds."""
    block, tensor, made = tl.block_type, tl.tensor, {}
    block_init, tensor_init, equal = block.__init__, tensor.__init__, tl.dtype.__eq__

    def new_block(cls: type, element_ty: tl.dtype, shape: Any) -> tl.block_type:
        key = (element_ty.name, *(getattr(side, "value", side) for side in shape))
        found = made.get(key)
        return made.setdefault(key, object.__new__(cls)) if found is None else found

    def init_block(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        if "numel" not in self.__dict__:
            block_init(self, element_ty, shape)

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        known = type.__dict__.get("of_tensors")
        if known is None:
            tensor_init(self, handle, type)
            type.of_tensors = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = known

    block.__new__, block.__init__, tensor.__init__ = new_block, init_block, init_tensor
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _skip_checks_of_equal_types() -> None:
    """Operands of one type are neither cast nor broadcast."""
    from triton.language.semantic import TritonSemantic  # which an older Triton lacks

    check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    cast = TritonSemantic.cast

    def checked(self: TritonSemantic, lhs: Any, rhs: Any, *rules: bool, **named: bool) -> tuple[tl.tensor, tl.tensor]:
        if not named and len(rules) < 4 and isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            if lhs.type is rhs.type and not lhs.dtype.is_ptr():
                return lhs, rhs
        return check(self, lhs, rhs, *rules, **named)

    def broadcasted(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        a, b = lhs.type, rhs.type
        if a is b or (a.is_block() and b.is_block() and lhs.handle.data.shape == rhs.handle.data.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def changed(self: TritonSemantic, input: tl.tensor, dst_ty: tl.dtype, *rounding: str | None) -> tl.tensor:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding)

    TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value = checked, broadcasted
    TritonSemantic.cast = changed
    TritonSemantic.computation_type_impl = lru_cache(TritonSemantic.computation_type_impl)
