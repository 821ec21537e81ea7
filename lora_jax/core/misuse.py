"""Values that stand where arrays sat say so when plain JAX code meets them.

Without this, forgetting `lift` surfaces as "unsupported operand type(s) for @".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lora_jax.core.errors import RequestError

_BINARY = (
    "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and",
    "or", "xor", "divmod",
)  # fmt: skip
# Not `bool` and `len`: inside the package, `value and …` asks whether there is one.
_OTHER = (
    "neg", "pos", "abs", "invert", "lt", "le", "gt", "ge", "getitem", "iter", "float", "int",
    "array", "jax_array",
)  # fmt: skip
OPERATORS = [f"__{name}__" for name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER)]
# Attributes of arrays that these classes do not have for uses of their own.
ATTRIBUTES = {
    "T", "mT", "at", "astype", "ravel", "flatten", "sum", "mean", "max", "min", "dot", "swapaxes",
    "take", "item", "copy", "conj", "real", "imag",
}  # fmt: skip

Class = TypeVar("Class", bound=type)


def refuses_use(message: Callable[[Any], str]) -> Callable[[Class], Class]:
    """A class decorator: arithmetic, indexing and conversion raise `RequestError(message(self))`.

    Args:
      message: gives the error's line for an instance.

    Returns:
      The decorator; it leaves alone what the class defines itself.
    """

    def refuse(self, *_, **__):
        raise RequestError(message(self))

    def of_attribute(self, name: str):
        if name in ATTRIBUTES:
            raise RequestError(message(self))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def decorate(cls: Class) -> Class:
        for name in OPERATORS:
            if name not in cls.__dict__:
                setattr(cls, name, refuse)
        cls.__getattr__ = of_attribute
        cls.__array_ufunc__ = None  # NumPy's arrays leave the operation to this class
        return cls

    return decorate
