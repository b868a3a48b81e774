"""A few cases of every op, in a process of its own: python -m cuda_on_host.sweep FOLDER, in tests/."""

import sys
from pathlib import Path

from .backend import install


def main(folder: Path) -> None:
    install(folder)
    import pytest
    import torch
    from cases import CASES, DTYPES, OPS, Case, check, make_inputs

    from ppllava_kernels import prompt_relevance

    from .epilogues import compare

    torch.use_deterministic_algorithms(True, warn_only=True)
    cases = [CASES["overlap"], CASES["ragged_adaptive"], Case((2, 9, 5, 3), (104, 24), dict(kernel_size=(4, 3, 3)))]
    # Parts of several tiles, and several parts for each block.
    cases.append(Case((2, 7, 8, 8), (8, 8), dict(kernel_size=(7, 4, 8))))
    for case, dtype in zip(cases, ("bf16", "fp32", "fp32", "fp16")):
        for op in OPS:
            if not op.endswith("project"):
                check(op, case, make_inputs(case, DTYPES[dtype]), ("cuda", "cpu"))
        compare(case, DTYPES[dtype][0])

    # What a launch is refused for is raised by the call that asked for it.
    wide = torch.zeros(1, 1, 1, 1, 60_000), torch.zeros(1, 60_000)
    with pytest.raises(RuntimeError, match="backend='cuda' could not run its kernel: image_embeds has more channels"):
        prompt_relevance(*wide, backend="cuda")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
