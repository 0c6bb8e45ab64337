"""Triton's interpreter in half its time: what it replaces in its language is found once, and replaced once a launch.

While a kernel runs, builtins of the language are replaced by functions of the interpreter. Triton looks for them among
all members of its modules at every launch, and again whenever one jitted function calls another, where they are
replaced already. And it makes its table of NumPy's types for every value.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from triton import language
from triton.runtime import interpreter


@functools.cache
def _languages(function: Callable[..., Any]) -> frozenset[int]:
    """Which of the two modules that are patched the function sees; `standard` sees the second only."""
    seen = function.__globals__.values()
    return frozenset(i for i, module in enumerate((language, language.core)) if any(one is module for one in seen))


@functools.cache
def _builtins(package: Any) -> list[tuple[str, Any]]:
    """Members to replace of a module or class that is as Triton defines it."""
    return [(name, member) for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]


def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    for name, member in _builtins(package):
        interpreter._patch_attr(package, name, member, builder, scope)


def speed_up() -> None:
    """From here on in this process."""
    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    numpy_type = interpreter._get_np_dtype
    numpy_type_of_scalar = functools.cache(numpy_type)
    patched: set[int] = set()

    def numpy_type_of(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, language.block_type) else dtype
        return numpy_type_of_scalar(scalar) if type(scalar) is language.dtype else numpy_type(dtype)

    def patch_new(function: Callable[..., Any]) -> Any:
        languages = _languages(function)
        if languages and languages <= patched:
            return None  # only a launch, which comes first, restores anything
        patched.update(languages)
        return patch(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        execute(self, *args, **kwargs)

    interpreter._get_np_dtype, interpreter._patch_builtin = numpy_type_of, _patch_builtin
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_new, launch
