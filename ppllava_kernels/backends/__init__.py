"""The backends, best first. A backend is a module; all have the same function names and signatures."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from . import cpp, cuda, reference
from .triton import backend as triton

BACKENDS = {"cuda": cuda, "cpp": cpp, "triton": triton, "reference": reference}
# Of the projector: Triton multiplies and pools in one kernel, cuda writes each tile between the two.
PROJECTOR = ("cpp", "triton", "cuda", "reference")


def why_not(backend: str, *tensors: Tensor) -> str | None:
    """One sentence on why `backend` cannot run, with these tensors or, without tensors, at all; None if it can.

    Raises:
        ValueError: for a name that is no backend.
    """
    check_name(backend)
    return BACKENDS[backend].why_not(*tensors)


def check_name(backend: str) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}; None takes the best")


def compatible_backends(*tensors: Tensor) -> list[str]:
    """Names of the backends that can run with these tensors, best first; `backend=None` takes the first.

    The projector's ops take "triton" before "cuda".
    """
    return [name for name, backend in BACKENDS.items() if backend.why_not(*tensors) is None]


def best_backend(*tensors: Tensor, order: Iterable[str] = BACKENDS) -> str:
    """The first of `order` that can run with these tensors."""
    return next(name for name in order if BACKENDS[name].why_not(*tensors) is None)
