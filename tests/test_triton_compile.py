"""Every Triton kernel compiles for GPUs that are not here, without a single spilled register."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_triton.py"
KERNELS = {
    "score_patches", "normalise_patches", "grad_sums", "relevance_backward", "pool_windows", "backward_windows",
    "backward_patches",
}  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "dtype"), [(80, "bfloat16"), (90, "bfloat16"), (90, "float32"), (100, "bfloat16"), (100, "float16")]
)
def test_no_spills(arch, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(arch), dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] < 255, row
