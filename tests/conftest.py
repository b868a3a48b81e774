"""Backends on devices, as parameters of every op test, and the settings that all tests run under."""

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

# Before torch starts its threads: several test processes share the cores, and idle threads must not spin on them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # one for each core; processes that a test starts inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from stamps import (  # noqa: F401  hooks
    pytest_addoption,
    pytest_runtest_makereport,
    pytest_runtest_setup,
    pytest_terminal_summary,
)

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined

# Set by test_cuda_on_host.py: the folder of CUDA kernels that were compiled for this CPU.
ON_HOST = os.environ.get("PPLLAVA_TEST_CUDA_ON_HOST")
if ON_HOST:
    from cuda_on_host.backend import install

    install(Path(ON_HOST))
elif not GPU and importlib.util.find_spec("triton"):
    from interpreter import make_fast, round_to_nearest

    make_fast()
    round_to_nearest()

# With warn_only every uninitialised tensor, at::empty in C++ included, is filled with NaN: a kernel that leaves an
# element out cannot pass.
torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def seed():
    """The same random tensors for a test wherever and in whatever order it runs."""
    torch.manual_seed(0)


def pytest_configure(config):
    """The folder that all processes of this run share, for what truth.py computes once."""
    if "PPLLAVA_TEST_TRUTHS" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="ppllava_truths_")
        os.environ["PPLLAVA_TEST_TRUTHS"] = folder.name
        config.add_cleanup(lambda: os.environ.pop("PPLLAVA_TEST_TRUTHS"))
        config.add_cleanup(folder.cleanup)


def pytest_collection_finish(session):
    """What was imported stays, so the collector of garbage need not look at it, which takes longer than most tests."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from scheduling import OneWorkerForAFile

    return OneWorkerForAFile(config, log)


def pytest_report_header(config):
    if not GPU:
        return "no CUDA GPU: Triton runs in its interpreter, tests marked gpu are left out; `make gpu` runs them"
    return f"GPU: {torch.cuda.get_device_name()}; Triton's interpreter is left out, it runs where there is no GPU"


def pytest_collection_modifyitems(config, items):
    def runs_here(item):
        marked = item.get_closest_marker("gpu") is not None
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        # A plain backend="triton" is a test on CPU tensors.
        interpreted = item.get_closest_marker("interpreter") is not None or parameters.get("backend") == "triton"
        return (GPU or not marked) and not (GPU and interpreted)

    kept = [item for item in items if runs_here(item)]
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = kept


PLACES = [
    pytest.param(("cpp", "cpu"), id="cpp"),
    pytest.param(("triton", "cpu"), id="triton-interpreter", marks=pytest.mark.interpreter),
    pytest.param(("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
]
if ON_HOST:
    PLACES = [pytest.param(("cuda", "cpu"), id="cuda-on-host")]


@pytest.fixture(params=PLACES)
def place(request):
    """(backend, device) of every kernel that can run here."""
    return request.param


REFERENCE = [] if ON_HOST else [pytest.param(("reference", "cpu"), id="reference")]


@pytest.fixture(params=REFERENCE + PLACES)
def backend(request):
    """The name of every backend that can run here, whose device new tensors get."""
    name, device = request.param
    with torch.device(device):
        yield name
