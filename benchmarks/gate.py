"""The one tolerance rule, of the tests (tests/close.py) and of the benchmarks: no time is shown for a wrong result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RULE = (
    "max |actual - exact| <= 2 max |other - exact| + eps(dtype) max |exact|; exact: the reference in float64; other: "
    "the reference in this dtype with its channels in several orders, and exact for inputs moved by the eps of the "
    "accumulator. Peers: + 32 eps(float32) max |exact|, as compiled sums may add thousands of terms one by one; the "
    "original, which rounds more, must be the same function in float64 and then comes in place of the reference in "
    "this dtype"
)
RUNS = 6  # of each other; one can be exact by luck
RUNS_OF_LARGE, LARGE = 2, 1 << 24  # elements; the largest error of so many is no matter of luck
PEER_SLACK = 32 * torch.finfo(torch.float32).eps
SAME_FUNCTION = 1e-9  # relative, in float64: another order of summation passes, another window does not


@dataclass(frozen=True)
class Verdict:
    """Error and limit of the worst of some tensors, relative to the largest element of the exact one."""

    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.error) and self.error <= self.limit

    def __str__(self) -> str:
        return f"error {self.error:.1e} {'<=' if self.passed else 'is not <='} {self.limit:.1e}"


def runs(elements: int) -> int:
    """How many of each other, for inputs of so many elements."""
    return RUNS if elements < LARGE else RUNS_OF_LARGE


def nudged(x: Tensor, seed: int) -> Tensor:
    """x in float64, each element moved by up to the eps of its accumulator, relatively."""
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.rand(x.shape, dtype=torch.float64, device=x.device, generator=generator) * 2 - 1
    return x.double() * (1 + torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps * noise)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error over the largest element; infinite for another shape and for NaN."""
    if actual.shape != exact.shape:
        return float("inf")
    largest = exact.abs().max().clamp_min(torch.finfo(exact.dtype).tiny)
    return ((actual.to(exact) - exact).abs().max() / largest).nan_to_num(nan=float("inf")).item()


def relative_errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [relative_error(a, x) for a, x in zip(actual, exact, strict=True)]


def judge(
    errors: Sequence[float], unavoidable: Sequence[float], dtypes: Sequence[torch.dtype], slack: float = 0.0
) -> Verdict:
    """RULE for tensors that belong together, for example the gradients of one op, given relative errors."""
    limits = [2 * u + torch.finfo(d).eps + slack for u, d in zip(unavoidable, dtypes, strict=True)]
    verdicts = [Verdict(error, limit) for error, limit in zip(errors, limits, strict=True)]
    return max(verdicts, key=lambda verdict: verdict.error / verdict.limit)


def same_function(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> Verdict:
    """Whether a peer that rounds more than the reference does computes the same function: both in float64."""
    return Verdict(max(relative_errors(actual, exact)), SAME_FUNCTION)
