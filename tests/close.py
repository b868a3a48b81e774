"""The one tolerance rule.

    max |actual - exact| <= 2 max |other - exact| + eps(dtype) max |exact|

`exact` is the reference in float64. `other` are the errors that cannot be blamed on a kernel: the reference in the
dtype of the inputs, with the channels in several orders, and `exact` with every input moved by at most the eps of the
accumulator, several times, since one run can be exact by luck. The last term is one rounding of the largest output.
"""

import torch


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def nudged(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x in float64, each element moved by up to the eps of its accumulator, relatively."""
    noise = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x.double().cpu() * (1 + eps(accumulator(x.dtype)) * noise)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """max |actual - exact|; NaN where one is NaN or infinite and the other is not the same."""
    actual = actual.double().cpu()
    same = (actual == exact) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, (actual - exact).abs())
    return difference.max().item() if difference.numel() else 0.0


def assert_close(name: str, actual: torch.Tensor, others: list[torch.Tensor], exact: torch.Tensor) -> None:
    """actual against exact, by the rule above; the first of `others` has the dtype to expect."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == others[0].dtype, f"{name}: {actual.dtype}, expected {others[0].dtype}"
    finite = exact[exact.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    unavoidable = max(error(other, exact) for other in others)
    got, allowed = error(actual, exact), 2 * unavoidable + eps(actual.dtype) * largest
    assert got <= allowed, f"{name}: error {got:.3g}, allowed {allowed:.3g}, largest value {largest:.3g}"
