"""Every CUDA kernel compiles for GPUs that are not here, without a stack frame or a spilled register."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
KERNELS = {
    "score_and_normalise", "relevance_backward", "pool_windows", "backward_windows", "backward_patches",
    "score_and_pool", "share_windows", "score_windows", "collect_scores", "score_embeds", "pool_tile", "tile_backward",
}  # fmt: skip
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_only(source: Path, arch: str, folder: Path) -> str:
    """What ptxas says of each kernel."""
    target = folder / f"{source.stem}.{arch}.cubin"
    command = ["nvcc", "-cubin", source, "-o", target, "-std=c++17", "-O3", "-Xptxas=-v", "-Werror=all-warnings"]
    command.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH; the CUDA toolkit has it")
def test_the_extension_has_them_without_a_gpu():
    from ppllava_kernels import _C

    assert _C.cuda_architectures.split()
    assert not hasattr(_C, "cuda_missing")


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on the PATH; the CUDA toolkit has it")
@pytest.mark.stamped("csrc")
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_no_spills(arch, tmp_path):
    # A worker of pytest-xdist has one core.
    with ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2) as pool:
        reports = list(pool.map(lambda source: compile_only(source, arch, tmp_path), SOURCES))
    found = [match for report in reports for match in REPORT.finditer(report)]
    names = {name for match in found for name in KERNELS if name in match["name"]}
    assert names == KERNELS
    assert len(found) == len(KERNELS)
    for match in found:
        usage = {key: int(match[key]) for key in ("stack", "stores", "loads", "registers")}
        assert match["arch"] == f"sm_{arch}"
        assert (usage["stack"], usage["stores"], usage["loads"]) == (0, 0, 0), (match["name"], usage)
        assert usage["registers"] <= 128, (match["name"], usage)  # two blocks of 256 threads on a processor
