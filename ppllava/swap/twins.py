"""Objects of transformers in another class: the same attributes, modules and parameters, and a mixin before their own
class."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from ..compat import COMPILED, HOOK, HOOKED_FORWARD, WEIGHTS


class Twin:
    """What the mixins have in common.

    made_of    (the mixin, the class of transformers, arguments that its forward takes besides)
    """

    made_of: tuple[type, type, tuple[str, ...]]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        name, theirs = cls.__qualname__, cls.__name__
        raise TypeError(f"{name} must be made by ppllava.compress; load a {theirs} of transformers, and compress it")

    def __reduce_ex__(self, protocol):
        return _empty, self.made_of, self.__dict__


def twin(original: Any, mixin: type[Twin], extra: tuple[str, ...] = ()) -> Any:
    """The original in a subclass of its class.

    Raises:
        ValueError: for a module with a forward of its own, which would be the original's.
    """
    new = _with_attributes(_subclass(mixin, type(original), extra), original)
    if isinstance(original, nn.Module):
        for name in COMPILED:
            new.__dict__.pop(name, None)
        # accelerate's hooks are bound to the module that they were put on.
        if (hook := new.__dict__.pop(HOOK, None)) is not None:
            from accelerate.hooks import add_hook_to_module

            for name in ("forward", HOOKED_FORWARD):
                new.__dict__.pop(name, None)
            add_hook_to_module(new, copy.copy(hook))
        elif "forward" in new.__dict__:
            raise ValueError(
                f"model must have the forward of its class, got a {type(original).__name__} with one of its own, as "
                "accelerate's prepare gives it; compress the model before that"
            )
    return new


def untwin(new: Twin) -> Any:
    """An object of the class that the original had, with the attributes that its twin has now."""
    return _with_attributes(new.made_of[1], new)


def _with_attributes(cls: type, other: Any) -> Any:
    new = object.__new__(cls)
    new.__dict__.update(other.__dict__)
    if isinstance(other, nn.Module):
        # Children and hooks that one of the two gets are not the other's; parameters and buffers are.
        for name, value in other.__dict__.items():
            if isinstance(value, (dict, set)) and name not in WEIGHTS:
                new.__dict__[name] = copy.copy(value)
    return new


def _empty(*made_of: Any) -> Any:
    cls = _subclass(*made_of)
    return object.__new__(cls)


@functools.cache
def _subclass(mixin: type[Twin], original: type, extra: tuple[str, ...]) -> type:
    # Of the same name, by which transformers looks up what belongs to a class.
    members = {"__module__": __name__, "__qualname__": f"Compressed{original.__name__}", "__doc__": mixin.__doc__}
    members["made_of"] = (mixin, original, extra)
    if extra:
        members["forward"] = _with_arguments(original.forward, extra)
    return type(original.__name__, (mixin, original), members)


def _with_arguments(forward: Callable, extra: tuple[str, ...]) -> Callable:
    """forward, with names in its signature, where `generate` and Trainer look for what a model takes."""

    @functools.wraps(forward)
    def with_extra(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()  # the last are **kwargs, which go on to the base model
    new = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in extra]
    with_extra.__signature__ = signature.replace(parameters=[*named, *new, rest])
    return with_extra


__all__ = ["Twin", "twin", "untwin"]
