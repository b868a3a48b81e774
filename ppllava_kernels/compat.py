"""Every private name of PyTorch that this package uses: what a new version may rename.

All of them were seen in PyTorch 2.13.0; tests/test_compat.py imports and calls each, and finds none elsewhere.
"""

from __future__ import annotations

from types import FunctionType

import torch
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _after_autograd_keyset,
    _any_requires_grad,
    _are_functorch_transforms_active,
    _AutoDispatchBelowAutograd,
)
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._functorch.utils import enable_single_level_autograd_function
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "FakeTensor",
    "any_requires_grad",
    "apply_in_transform",
    "below_autograd",
    "current_raw_stream",
    "driver_version",
    "hide_from_dynamo",
    "in_forward_mode",
    "in_transform",
    "is_plain",
    "keys_below_autograd",
]

any_requires_grad = _any_requires_grad
below_autograd = _AutoDispatchBelowAutograd
in_transform = _are_functorch_transforms_active  # of torch.func: grad, vmap and those made of them

# The dispatch keys left below autograd where tensors are plain: none fake, functional or transformed, no mode active.
_CPU, _CUDA = DispatchKeySet(DispatchKey.CPU), DispatchKeySet(DispatchKey.CUDA)
_PLAIN = frozenset(keys.raw_repr() for keys in (_CPU, _CUDA, _CPU | _CUDA))
_BELOW_AUTOGRAD = _after_autograd_keyset.raw_repr()

# torch.cuda.current_stream(i).cuda_stream wraps the same call in an object. A build without CUDA has none.
current_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def is_plain(keys: DispatchKeySet) -> bool:
    """Whether a call with these keys could only find the kernel of its device next."""
    return keys.raw_repr() & _BELOW_AUTOGRAD in _PLAIN


def keys_below_autograd(keys: DispatchKeySet) -> DispatchKeySet:
    return keys & _after_autograd_keyset


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def apply_in_transform(function: type[torch.autograd.Function], *arguments):
    """`function.apply` for one level of torch.func, inside of the dispatcher, which unwraps what comes below it."""
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*arguments)


def hide_from_dynamo(function: FunctionType) -> FunctionType:
    """Let torch.compile run `function` and all that it calls as it is, where a frame around it was not compiled.

    As torch.compiler.disable, which imports the compiler at once: seconds, for those who never use it.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def driver_version() -> int:
    """Of CUDA that the driver is for: 13000 for 13.0."""
    return torch._C._cuda_getDriverVersion()
