"""The projector's CUDA kernels one by one: on CPUs products.py multiplies float16 in float32, and no op calls those.

After `install` of backend.py.
"""

from __future__ import annotations

import torch
from cases import Case, cu_frames_of

from ppllava_kernels.backends import cpp, cuda, products
from ppllava_kernels.backends.plan import clip_counts, make_plan
from ppllava_kernels.shapes import make_window

TILE = {"cpu": (16, 0)}  # patches: some rows of a frame, or several frames


def compare(case: Case, dtype: torch.dtype) -> None:
    """Those of `cuda` with those of `cpp`, on tiles smaller than a clip."""
    actual, expected = run(cuda, case, dtype), run(cpp, case, dtype)
    for name, x in actual.items():
        torch.testing.assert_close(
            x, expected[name], rtol=1e-2, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def run(kernels, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    width = case.channels[1]
    features, weights = normal(*case.size, 1), normal(*case.size, dtype=torch.float32)
    hidden, bias, text = normal(weights.numel(), width), normal(width), normal(width, dtype=torch.float32)
    cu_frames, temperature = cu_frames_of(case), 0.5
    plan = make_plan(features, make_window(**case.window), cu_frames)
    sums = torch.zeros(*plan.pooled_shape[:-1], width)
    grad = normal(*sums.shape)
    cosines = torch.empty(len(hidden))
    shares = kernels.window_shares(features, weights, temperature, plan)
    dots = torch.zeros_like(shares)
    usual, products.TILE = products.TILE, TILE
    for tile in products.tiles(features, clip_counts(features, cu_frames)):
        z = hidden[tile.patches]
        kernels.score_rows(cosines[tile.patches], z, text)
        kernels.pool_hidden(sums, z, bias, shares, tile.first, 0, features, plan)
        kernels.pool_hidden_backward(z, bias, shares, dots, grad, tile.first, 0, features, plan)
    products.TILE = usual
    grad_weights = kernels.window_shares_backward(weights, shares, dots, features, temperature, plan)
    return dict(cosines=cosines, sums=sums, grad_hidden=hidden, grad_weights=grad_weights)
