"""Values with named fields that code which walks through messages leaves whole."""

from __future__ import annotations


class Record:
    """Base of a class whose `__slots__` are its fields, in the order of its `__init__`, which sets them with `_set`.

    It is neither a tuple nor a mapping nor a dataclass: chat templates of transformers 5.24 and newer rebuild each of
    these in a message, tuples as plain tuples and dataclasses as dicts. Fields are set once; two records are equal if
    they are the same object; `copy` and `pickle` make new ones.
    """

    __slots__ = ()

    def _set(self, *values: object) -> None:
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} of a {type(self).__name__} cannot be set; make a new {type(self).__name__}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} of a {type(self).__name__} cannot be deleted; it belongs to it")

    def __reduce__(self) -> tuple:
        return type(self), tuple(getattr(self, name) for name in self.__slots__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(getattr(self, name))}' for name in self.__slots__)})"


def _shown(value: object) -> str:
    """Of arrays and tensors their type and shape: a clip has millions of numbers."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"<{value.dtype} {list(value.shape)}>"
    return repr(value)


__all__ = ["Record"]
