"""Results in 16 bits are rounded to nearest, ties to even, by every backend."""

import pytest
from cases import BF16, F16, F32, Case, make
from truth import cast, run

ROUNDED = {
    "weighted_pool3d": ("output", "grad of values"),
    "prompt_relevance": ("grad of image_embeds",),
    "prompt_guided_pool3d": ("output", "grad of values", "grad of image_embeds"),
}
CASE = Case((1, 2, 2, 3), (24, 40), dict(kernel_size=(2, 2, 2), stride=1))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("op", ROUNDED)
def test_results_are_those_in_float32_rounded(op, dtype, place):
    """Where a kernel computes in float32, it differs from the same in 16 bits in the last rounding alone.

    The sums of the two may have another order, which sends a few to the other side of a tie.
    """
    case, (backend, device) = CASE, place
    low = {name: x.to(device) for name, x in make(op, case, (dtype, dtype, dtype, F32)).items()}
    actual, exact = run(op, case, low, backend), run(op, case, cast(low, F32), backend)
    for name in ROUNDED[op]:
        assert actual[name].dtype == dtype
        assert (actual[name] == exact[name].to(dtype)).double().mean() > 0.99, name
