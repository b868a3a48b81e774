"""Every op, backend, direction and shape of the registry beside its peers, for pytest-benchmark.

    pytest benchmarks                                          # on a CPU without the shapes that take long
    pytest benchmarks -k "weighted_pool3d and vicuna7b_16frames and bf16"
    pytest benchmarks --benchmark-save=before
    pytest benchmarks --benchmark-compare=0001 --benchmark-compare-fail=mean:10%

A group is one op, shape, dtype and direction: ours and the peers. A result is checked by benchmarks/gate.py, once,
before it is timed. The times are those of timing.Clock, as in `python -m benchmarks.kernels`, with cold caches: on a
GPU between two CUDA events around a call that was queued behind others, so that launches are not counted.
The variants of a group run one after the other, not in turns: for a difference of some percent, use `make regress`.
"""

from __future__ import annotations

import pytest
import torch

from ppllava_kernels.backends import BACKENDS

from .report import COMPILED_ORIGINAL
from .stage import MAX_ROUNDS, Stage, backends, cases, leaves_frames_over, peers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = [
    pytest.param(case, direction, variant, id=f"{case.op}-{case.shape.name}-{case.dtype}-{direction}-{variant}")
    for case in cases(DEVICE)
    for direction in case.directions
    for variant in (*backends(DEVICE, case.op), *peers(case))
]


class Total:
    """Of the seconds that the clock measured: pytest-benchmark takes the difference over a call for its time."""

    seconds = 0.0


def clock() -> float:
    return Total.seconds


@pytest.fixture(scope="module")
def stage():
    return Stage(DEVICE)


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize(("case", "direction", "variant"), PARAMETERS)
def test_op(case, direction, variant, stage, benchmark, request):
    if variant == COMPILED_ORIGINAL and direction != "forward" and leaves_frames_over(case):
        pytest.skip(
            "its code can write out of bounds where frames are left over, and would end this process; "
            "`python -m benchmarks.kernels` has it in a process of its own"
        )
    stage.enter(case)
    row = stage.check(direction, variant)
    if row.status != "ok":
        unable = row.status == "failed" and stage.unable(stage.contenders[variant])
        (pytest.skip if unable else pytest.fail)(f"{row.status}: {row.reason}")
    timed = stage.variant(direction, variant)

    def call() -> None:
        Total.seconds += stage.seconds(timed)

    call()  # the judged call was the first, compilation included; this one warms up
    benchmark.group = f"{case.op} {case.shape.name} {case.dtype} {direction}"
    benchmark.extra_info.update(device=DEVICE, ours=variant in BACKENDS, error=row.error, limit=row.limit)
    benchmark.pedantic(call, rounds=rounds(stage, timed, request.config))


def rounds(stage: Stage, timed, config) -> int:
    """As many as fit into --benchmark-max-time, but --benchmark-min-rounds at least."""
    fit = float(config.getoption("benchmark_max_time")) / max(stage.seconds(timed), 1e-9)
    return max(config.getoption("benchmark_min_rounds"), int(min(fit, MAX_ROUNDS)))
