"""The CUDA kernels themselves on this CPU, in the whole matrix of cases: under ASan and UBSan, and for races.

How a grid runs on a CPU is in tests/cuda_on_host. Without a GPU this is the proof of the backend `cuda`; with one,
`make gpu` runs the same cases there.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import build

TESTS = Path(__file__).parent
OP_TESTS = ("weighted_pool3d", "prompt_relevance", "prompt_guided_pool3d", "prompt_guided_project")
pytestmark = [
    pytest.mark.timeout(600),  # the first test compiles
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.stamped("csrc", "ppllava_kernels", "tests/cuda_on_host", "tests/golden", "benchmarks/gate.py"),
    pytest.mark.stamped(*(f"tests/test_{name}.py" for name in (*OP_TESTS, "memory", "mutation", "autograd"))),
]


@pytest.fixture(scope="module")
def sanitized():
    return build.build(build.FOLDER / "ops").parent


@pytest.fixture(scope="module")
def races():
    return build.build(build.FOLDER / "ops_races", races=True).parent


def run(folder: Path, *command: str, **settings: str) -> tuple[int, str]:
    """Exit status and output of a Python that takes its CUDA kernels from `folder`."""
    variables = {f"CUDA_ON_HOST_{name.upper()}": value for name, value in settings.items()}
    variables |= build.environment(folder) | {"PPLLAVA_TEST_CUDA_ON_HOST": str(folder), "OMP_NUM_THREADS": "1"}
    variables |= {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    # Only children of this process, which is a worker of pytest-xdist itself, must not think they were.
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=TESTS,
        env=inherited | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout


def sweep(folder: Path, *arguments: str, **settings: str) -> tuple[int, str]:
    return run(folder, "-m", "cuda_on_host.sweep", str(folder), *arguments, **settings)


@pytest.mark.parametrize(
    ("files", "least"),
    [
        ("test_weighted_pool3d.py", 110),
        ("test_prompt_relevance.py", 38),
        ("test_prompt_guided_pool3d.py", 51),
        ("test_prompt_guided_project.py", 65),
        ("test_memory.py test_mutation.py test_autograd.py", 60),
    ],
)
def test_every_case_under_sanitizers(files, least, sanitized):
    """-s: a sanitizer ends the process, and what it says must not go into a file of pytest."""
    status, output = run(
        sanitized, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", "cuda-on-host", *files.split()
    )
    assert status == 0, output[-6000:]
    assert int(re.search(r"(\d+) passed", output)[1]) >= least, output[-2000:]


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle:1"])
def test_no_races(order, races):
    status, output = sweep(races, order=order)
    assert status == 0, output[-6000:]


def test_every_barrier_is_needed(races, tmp_path):
    """Without any one of them a race is found: so a missing one would be, too."""
    status, output = sweep(races, sites=str(tmp_path / "sites"))
    assert status == 0, output[-6000:]
    sites = (tmp_path / "sites").read_text().splitlines()
    kernels = {Path(site.split(":")[0]).name for site in sites}
    assert {"prompt_relevance.cu", "weighted_pool3d.cu", "prompt_guided_pool3d.cu"} <= kernels
    status, output = sweep(races, str(len(sites)))
    assert status == 0, output[-6000:]
    passed = json.loads(output.splitlines()[-1])
    assert [sites[n - 1] for n in passed] == []
