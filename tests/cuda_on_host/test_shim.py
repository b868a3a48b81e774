"""What a run of CUDA kernels on the CPU finds: kernels of selftest.cu, each in a process of its own."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from cuda_on_host import build

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=build.why_not() or ""),
    pytest.mark.stamped("csrc/cuda", "csrc/shapes.h", "tests/cuda_on_host"),
]

ORDERS = ["forward", "reverse", "shuffle:1", "shuffle:2"]
RIGHT = [
    "warp_reduction",
    "warp_collectives",
    "block_reduction",
    "two_block_sums",
    "grid_sum",
    "last_block_sum",
    "strided_copy",
]
# What is found however the threads are ordered.
FAULTS = {
    "past_shared": "heap-buffer-overflow",
    "past_global": "heap-buffer-overflow",
    "not_aligned": "misaligned address",
    "deep_recursion": "stack-overflow",
    "never_written": r"never_written: wrong at 0: got -nan",
    "divergent_shuffle": r"thread 0 waits in __shfl_xor_sync at SITE \(mask 0xffffffff\), but .* __shfl_sync at SITE",
    "shuffle_after_exit": r"thread 0 waits in __shfl_sync at SITE .*, but block \d thread 31 has exited",
    "shuffle_outside_of_mask": r"reads lane 16, which is not in the mask: .* at SITE",
    "barrier_of_some": r"thread 0 waits in __syncthreads at SITE, but block \d thread 64 has exited",
    "two_barriers": r"thread 0 waits in __syncthreads at SITE, but block \d thread 64 waits in __syncthreads at SITE",
    "grid_barrier_of_some": r"thread 0 waits in grid_barrier at SITE, but block 0 thread 0 has exited",
    "grid_barrier_without_cooperation": r"grid_barrier at SOURCE:\d+:\d+, in a launch that is not cooperative",
}
# What one order or another shows as a wrong number, and the check of races in every order.
MISSING_BARRIERS = ["no_syncthreads", "no_syncwarp", "no_grid_barrier"]
SOURCE = build.HERE / "selftest.cu"


@pytest.fixture(scope="module")
def selftest():
    return build.build_selftest(build.FOLDER / "selftest")


@pytest.fixture(scope="module")
def races():
    return build.build_selftest(build.FOLDER / "selftest_races", races=True)


def run(executable: Path, *cases: str, **settings: str) -> tuple[int, str]:
    variables = {f"CUDA_ON_HOST_{name.upper()}": value for name, value in settings.items()}
    environment = {**os.environ, **variables, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [executable, *cases], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def line_of(kernel: str) -> int:
    lines = SOURCE.read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if f"void {kernel}(" in line)


@pytest.mark.parametrize("order", [*ORDERS, ""])
def test_right_in_every_order(selftest, races, order):
    for executable in (selftest, races):
        status, output = run(executable, *RIGHT * 3, order=order)
        assert status == 0, output
        assert output.splitlines() == [f"{case}: right" for case in RIGHT * 3]


def test_right_on_as_many_blocks_as_asked_for(selftest):
    assert run(selftest, "grid_sum", blocks="5")[0] == 0
    status, output = run(selftest, "grid_sum", blocks="2")
    assert status == 1
    assert "more blocks than are resident" in output


def test_launches_that_a_gpu_refuses(selftest):
    status, output = run(selftest, "launches")
    assert status == 0, output
    for words in ("needs a block", "multiple of 32", "227 KB", "more blocks than are resident"):
        assert words in output


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_found(selftest, case, order):
    # A site is a line and a column of the kernel, none of which has more than six lines.
    lines = "|".join(str(line_of(case) + n) for n in range(6)) if "SITE" in FAULTS[case] else ""
    message = FAULTS[case].replace("SITE", rf"SOURCE:({lines}):\d+").replace("SOURCE", re.escape(str(SOURCE)))
    status, output = run(selftest, case, order=order)
    assert status != 0, output
    assert re.search(message, output), output


@pytest.mark.parametrize("case", MISSING_BARRIERS)
def test_missing_barrier_is_found(selftest, races, case):
    results = {order: run(selftest, case, order=order) for order in ORDERS}
    wrong = [order for order, (status, output) in results.items() if status == 1 and f"{case}: wrong" in output]
    assert wrong, results
    status, output = run(selftest, *[case] * 3)  # of three launches one at least has such an order
    assert status == 1, output
    for order in ORDERS:
        status, output = run(races, case, order=order)
        assert status != 0, output
        assert "race: no barrier between block" in output
        assert f"{SOURCE}:" in output


def test_race_between_blocks_is_found(races):
    status, output = run(races, "two_blocks_write_one")
    assert status != 0, output
    assert f"{SOURCE}:{line_of('two_blocks_write_one') + 2}" in output


def test_every_barrier_can_be_left_out_and_is_missed(selftest, races, tmp_path):
    cases = ["block_reduction", "two_block_sums", "grid_sum", "last_block_sum"]
    assert run(selftest, *cases, sites=str(tmp_path / "sites"))[0] == 0
    sites = (tmp_path / "sites").read_text().splitlines()
    kinds = [site.split()[1] for site in sites]
    # Two in tree_sum, the two of block_sum and of grid_sum and last_block_sum one each.
    assert kinds == ["__syncthreads"] * 4 + ["grid_barrier", "__syncthreads"], sites
    assert f"{SOURCE}:" in sites[0]
    for n, site in enumerate(sites, 1):
        assert any(run(selftest, *cases, drop=str(n), order=order)[0] for order in ORDERS), site
        assert run(races, *cases, drop=str(n))[0] != 0, site


def test_unknown_order(selftest):
    status, output = run(selftest, "warp_reduction", order="backward")
    assert status != 0
    assert "must be forward, reverse or shuffle:<seed>, got backward" in output


def compile_only(folder: Path, source: str, *flags: str) -> subprocess.CompletedProcess:
    path = folder / "source.cu"
    path.write_text(source)
    command = ["g++", *build.COMMON, *build._kernel_flags(False, False), *flags, "-fsyntax-only", path]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_shared_variables_do_not_compile(tmp_path):
    kernel = '#include "cuda_on_host.h"\n__global__ void kernel() {{ {} float x[32]; x[threadIdx.x] = 1; }}\n'
    assert compile_only(tmp_path, kernel.format("")).returncode == 0
    refused = compile_only(tmp_path, kernel.format("__shared__"))
    assert refused.returncode != 0
    assert "all shared memory comes from dynamic_shared()" in refused.stderr


def test_triton_s_headers_are_enough(tmp_path, monkeypatch):
    headers = Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/include"
    if not headers.exists():
        pytest.skip("needs Triton's copy of the CUDA headers; pip install triton")
    monkeypatch.setattr(build, "cuda_include", lambda: headers)
    done = compile_only(tmp_path, f'#include "{SOURCE}"\n')
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not found; install the CUDA toolkit")
def test_nvcc_compiles_the_same_source(tmp_path):
    command = ["nvcc", "-arch=sm_90a", "-std=c++17", f"-I{build.CSRC / 'cuda'}", "-c", SOURCE, "-o", tmp_path / "x.o"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
