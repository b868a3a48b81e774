"""The mean of the op is AdaptiveAvgPool3d, as docs/swap.md says. Its code runs in test_docs.py."""

import pytest
import torch
from close import assert_close
from torch import nn

from benchmarks import gate
from ppllava_kernels import weighted_pool3d

SIZES = [
    ((1, 2, 24, 24, 16), (2, 12, 12)),  # PLLaVA's, but for fewer frames
    ((2, 8, 8, 16, 33), (4, 2, 8)),
]


def of_torch(values, output_size):
    return nn.AdaptiveAvgPool3d(output_size)(values.movedim(-1, 1)).movedim(1, -1)


@pytest.mark.parametrize(("shape", "output_size"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_whole_numbers_is_that_of_torch_to_the_bit(shape, output_size, dtype, backend):
    """Windows of 2, 4 or 8 patches: no sum and no quotient rounds, in whatever order."""
    values = torch.randint(-8, 9, shape).to(dtype)
    pooled = weighted_pool3d(values, None, output_size=output_size, backend=backend)
    assert torch.equal(pooled, of_torch(values, output_size))


@pytest.mark.parametrize(("shape", "output_size"), [*SIZES, ((1, 7, 10, 11, 24), (3, 4, 5))])
def test_any_mean_is_that_of_torch(shape, output_size, backend):
    values = torch.randn(shape)
    others = [of_torch(gate.nudged(values, seed), output_size).float() for seed in range(gate.RUNS)]
    exact = of_torch(values.double(), output_size)
    pooled = weighted_pool3d(values, None, output_size=output_size, backend=backend)
    assert_close("pooled", pooled, [of_torch(values, output_size), *others], exact)
