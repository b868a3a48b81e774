"""The tolerance rule of benchmarks/gate.py as an assertion.

    max |actual - exact| <= 2 max |other - exact| + eps(dtype) max |exact|

`exact` is the reference in float64. `other` are the errors that cannot be blamed on a kernel: the reference in the
dtype of the inputs, with the channels in several orders, and `exact` with every input moved by at most the eps of the
accumulator, several times, since one run can be exact by luck. The last term is one rounding of the largest output.
"""

import torch

from benchmarks import gate


def assert_close(name: str, actual: torch.Tensor, others: list[torch.Tensor], exact: torch.Tensor) -> None:
    """actual against exact, by the rule above; the first of `others` has the dtype to expect."""
    unavoidable = max(gate.relative_error(other, exact) for other in others)
    assert_within(name, actual, exact, unavoidable, others[0].dtype)


def assert_within(name: str, actual: torch.Tensor, exact: torch.Tensor, unavoidable: float, dtype: torch.dtype) -> None:
    """The same, where the largest relative error of the others is known."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
    verdict = gate.judge([gate.relative_error(actual, exact)], [unavoidable], [actual.dtype])
    assert verdict.passed, f"{name}: {verdict}"
