"""Triton's interpreter, as interpreter.py repairs it, against PyTorch."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton; pip install triton")
tl = triton.language

# Beside random numbers: ties to both sides, the largest that does not become infinite, the least, and none at all.
EDGES = [1.00390625, 1.01171875, -1.00390625, 3.3895314e38, 3.4e38, 1e-40, -1e-45, 0.0, -0.0, torch.inf, torch.nan]


@triton.jit
def copy(x, rounded, widened, N: tl.constexpr):
    at = tl.arange(0, N)
    low = tl.load(x + at).to(tl.bfloat16)
    tl.store(rounded + at, low)
    tl.store(widened + at, low.to(tl.float32))


@pytest.mark.interpreter
def test_the_interpreter_rounds_as_compiled_code():
    x = torch.cat([torch.tensor(EDGES), torch.randn(1024 - len(EDGES)) * torch.randn(1024 - len(EDGES)).exp2()])
    rounded, widened = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
    copy[(1,)](x, rounded, widened, 1024)
    torch.testing.assert_close(rounded, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(widened, x.to(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(rounded.signbit(), x.signbit())
