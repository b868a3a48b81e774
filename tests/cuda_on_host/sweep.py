"""A few cases of every op, in a process of its own: python -m cuda_on_host.sweep FOLDER [BARRIERS], in tests/.

With a number of barriers, once for each in a process without it. The last line then names those that were not missed.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from .backend import install


def prepare(folder: Path) -> Callable[[], None]:
    """The sweep, with all that runs no kernel behind it."""
    install(folder)
    import pytest
    import torch
    from cases import CASES, DTYPES, OPS, Case, make_inputs
    from truth import compare as judge
    from truth import run, truth

    from ppllava_kernels import prompt_relevance

    from .epilogues import compare

    torch.use_deterministic_algorithms(True, warn_only=True)
    cases = [CASES["overlap"], CASES["ragged_adaptive"], Case((2, 9, 5, 3), (104, 24), dict(kernel_size=(4, 3, 3)))]
    # Parts of several tiles, and several parts for each block.
    cases.append(Case((2, 7, 8, 8), (8, 8), dict(kernel_size=(7, 4, 8))))
    pairs = list(zip(cases, ("bf16", "fp32", "fp32", "fp16")))
    checks = [
        (op, case, inputs, truth(op, case, inputs))
        for case, dtypes in pairs
        for inputs in [make_inputs(case, DTYPES[dtypes])]
        for op in OPS
        if not op.endswith("project")
    ]

    def sweep() -> None:
        for op, case, inputs, right in checks:
            judge(op, run(op, case, inputs, "cuda"), right)
        for case, dtypes in pairs:
            compare(case, DTYPES[dtypes][0])

        # What a launch is refused for is raised by the call that asked for it.
        wide = torch.zeros(1, 1, 1, 1, 60_000), torch.zeros(1, 60_000)
        message = "backend='cuda' could not run its kernel: image_embeds has more channels"
        with pytest.raises(RuntimeError, match=message):
            prompt_relevance(*wide, backend="cuda")

    return sweep


def passes_without(barrier: int, sweep: Callable[[], None]) -> bool:
    """Whether the sweep does, in a child: its end may be that of a process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.environ["CUDA_ON_HOST_DROP"] = str(barrier)
    try:
        sweep()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, barriers: int = 0) -> None:
    sweep = prepare(folder)
    if not barriers:
        sweep()
        return
    passed = [barrier for barrier in range(1, barriers + 1) if passes_without(barrier, sweep)]
    sys.stdout.write(f"\n{json.dumps(passed)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
