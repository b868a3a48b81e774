"""Which backend can run, and the one sentence that says why another cannot, before anything is launched."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from cases import GUIDE, LAYERS, Case, make_projector_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import ppllava_kernels
from ppllava_kernels import compat, prompt_guided_project, weighted_pool3d, weighted_project
from ppllava_kernels.backends import BACKENDS, PROJECTOR, best_backend, cpp, cuda

VALUES = torch.randn(2, 4, 6, 6, 8)  # [B, T, H, W, D]
WINDOW = dict(kernel_size=(2, 3, 3))


UNUSABLE = {
    ("cpp", "meta"): "backend='cpp' cannot run: cpp runs on CPU tensors, got one on meta; "
    "use backend=None, or move it with .cpu()",
    ("triton", torch.float64): "backend='triton' cannot run: triton computes in float32 and got float64; "
    "use backend='reference', or float32 inputs",
    ("cuda", "cpu"): "backend='cuda' cannot run: cuda runs on CUDA tensors, got one on cpu; "
    "use backend=None, or move it with .cuda()",
    ("cuda", torch.float64): "backend='cuda' cannot run: cuda computes in float32 and got float64; "
    "use backend='reference', or float32 inputs",
}


@pytest.mark.parametrize("case", UNUSABLE, ids=str)
def test_unusable_backend(case):
    backend, change = case
    values = VALUES.to(change)
    assert ppllava_kernels.why_not(backend, values) == UNUSABLE[case].partition(": ")[2]
    assert backend not in ppllava_kernels.compatible_backends(values)
    with pytest.raises(ValueError, match=f"^{re.escape(UNUSABLE[case])}$"):
        weighted_pool3d(values, None, **WINDOW, backend=backend)


def test_triton_without_a_gpu(monkeypatch):
    from ppllava_kernels.backends.triton import backend

    monkeypatch.setattr(backend, "_interpreted", False)
    expected = "triton runs on CUDA tensors, got one on cpu; use backend=None, or move it with .cuda()"
    assert ppllava_kernels.why_not("triton", torch.ones(1)) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = "triton needs a CUDA GPU and this PyTorch finds none; use backend=None"
    assert ppllava_kernels.why_not("triton") == expected
    monkeypatch.setattr(backend, "_installed", False)
    expected = "the package triton is not installed; pip install 'triton>=3.6' (Linux), or use backend=None"
    assert ppllava_kernels.why_not("triton") == expected


def test_cpp_that_was_not_built(monkeypatch):
    monkeypatch.setattr(cpp, "missing", "the C++ extension is not there")
    assert ppllava_kernels.why_not("cpp") == "the C++ extension is not there"
    assert "cpp" not in ppllava_kernels.compatible_backends(torch.ones(1))
    assert weighted_pool3d(VALUES, None, **WINDOW).shape == (2, 2, 2, 2, 8)
    with pytest.raises(ValueError, match=r"^backend='cpp' cannot run: the C\+\+ extension is not there$"):
        weighted_pool3d(VALUES, None, **WINDOW, backend="cpp")


class CudaTensor:
    """What `why_not` asks of a tensor, on a GPU that is not here."""

    dtype, device = torch.float32, torch.device("cuda", 3)


@pytest.fixture
def other_gpu(monkeypatch):
    """A GPU of compute capability 7.5 with a driver for CUDA 12.6, and kernels compiled with that."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(major=7, minor=5))
    monkeypatch.setattr(compat, "driver_version", lambda: 12060)
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "_version", "12.8")
    monkeypatch.setattr(cuda, "_architectures", ["75"])
    monkeypatch.setattr(cuda, "_reasons", {})


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "_architectures", ["90"])
    expected = "cuda needs a CUDA GPU and this PyTorch finds none; use backend=None"
    assert ppllava_kernels.why_not("cuda") == expected


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("there was no nvcc when it was installed", "install the CUDA toolkit"),
        ("PPLLAVA_CUDA_ARCHS=none when it was installed", "unset PPLLAVA_CUDA_ARCHS"),
    ],
)
def test_cuda_that_was_not_built(monkeypatch, reason, remedy):
    monkeypatch.setattr(cuda, "missing", None)
    monkeypatch.setattr(cuda, "_architectures", [])
    monkeypatch.setattr(cuda, "_without", reason)
    expected = (
        f"this installation has no CUDA kernels ({reason}); {remedy}, then pip install --no-build-isolation "
        "--force-reinstall --no-deps --no-cache-dir . in the folder of the sources, or use backend=None"
    )
    assert cuda.why_not(CudaTensor) == expected
    monkeypatch.setattr(cuda, "missing", "the C++ extension is not there")
    assert cuda.why_not(CudaTensor) == "the C++ extension is not there"


def test_a_gpu_that_the_build_lacks(monkeypatch, other_gpu):
    assert cuda.why_not(CudaTensor) is None
    monkeypatch.setattr(cuda, "_architectures", ["80", "120+PTX"])
    monkeypatch.setattr(cuda, "_reasons", {})
    expected = (
        "its kernels are compiled for 80, 120+PTX and cuda:3 is 75; reinstall with PPLLAVA_CUDA_ARCHS=75, "
        "or use backend='triton'"
    )
    assert cuda.why_not(CudaTensor) == expected


def test_a_driver_that_is_too_old(monkeypatch, other_gpu):
    monkeypatch.setattr(cuda, "_version", "13.0")
    expected = (
        "its kernels are compiled with CUDA 13.0 and this driver is for CUDA 12.6; update the driver, "
        "or use backend='triton'"
    )
    assert cuda.why_not(CudaTensor) == expected


def test_a_gpu_of_another_make(monkeypatch, other_gpu):
    monkeypatch.setattr(torch.version, "hip", "6.2")
    expected = "cuda runs on NVIDIA GPUs and this PyTorch is for AMD's; use backend='triton'"
    assert cuda.why_not(CudaTensor) == expected


@pytest.mark.parametrize(
    ("built", "gpu", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),  # machine code of the same major version
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80+PTX", (9, 0), True),  # compiled when it is loaded
        ("120+PTX", (10, 0), False),
        ("90a", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100a", (10, 3), False),  # of that one GPU only
        ("80 86 89 90 100 120+PTX", (10, 3), True),
        ("80 86 89 90 100 120+PTX", (12, 1), True),
        ("80 86 89 90 100 120+PTX", (7, 5), False),
    ],
)
def test_architectures(built, gpu, runs):
    assert cuda.runs_on(built.split(), *gpu) is runs


def test_best_first():
    assert list(BACKENDS) == ["cuda", "cpp", "triton", "reference"]
    assert ppllava_kernels.compatible_backends(VALUES)[0] == "cpp"


@pytest.mark.parametrize(
    ("can", "pool", "project"),
    [
        ({"cpp", "triton", "reference"}, "cpp", "cpp"),  # CPU tensors, where Triton is in its interpreter
        ({"cuda", "triton", "reference"}, "cuda", "triton"),
        ({"cuda", "reference"}, "cuda", "cuda"),
        ({"triton", "reference"}, "triton", "triton"),
        ({"reference"}, "reference", "reference"),
    ],
)
def test_the_order_of_the_projector(can, pool, project, monkeypatch):
    for name, backend in BACKENDS.items():
        monkeypatch.setattr(backend, "why_not", lambda *tensors, name=name: None if name in can else "it cannot")
    assert best_backend(VALUES) == pool == ppllava_kernels.compatible_backends(VALUES)[0]
    assert best_backend(VALUES, order=PROJECTOR) == project
    assert set(PROJECTOR) == set(BACKENDS)


class Chosen(TorchDispatchMode):
    """The backends that the registered ops of a block are called with."""

    def __init__(self):
        super().__init__()
        self.names = {}

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function.namespace == "ppllava_kernels":
            self.names[function._opname] = next(x for x in arguments if isinstance(x, str))
        return function(*arguments, **(kwargs or {}))


def project(**options):
    """The backends of both ops of the projector, forward and backward."""
    case = Case((1, 2, 1, 2), (3, 2), dict(kernel_size=(1, 1, 2)))
    x = {name: v.requires_grad_() for name, v in make_projector_inputs(case).items()}
    layers = {name: x[name] for name in LAYERS}
    guide = {name: x[name] for name in ("text_embeds", *GUIDE)}
    with Chosen() as chosen:
        tokens = prompt_guided_project(x["features"], **guide, norm_eps=1e-5, **layers, **case.window, **options)
        tokens.sum().backward()
        weighted_project(x["features"], x["weights"], **layers, **case.window, **options).sum().backward()
    return chosen.names


OPS = ("guide_relevance", "hidden_pool3d", "hidden_pool3d_backward", "guide_relevance_backward")


def test_none_takes_cpp_on_the_cpu():
    assert project() == project(backend=None) == dict.fromkeys(OPS, "cpp")
    assert project(backend="reference") == {}


@pytest.mark.interpreter
def test_the_projector_where_cpp_was_not_built(monkeypatch):
    monkeypatch.setattr(cpp, "missing", "the C++ extension is not there")
    assert project() == dict.fromkeys(OPS, "triton")
    with pytest.raises(ValueError, match=r"^backend='cpp' cannot run: the C\+\+ extension is not there$"):
        project(backend="cpp")


def test_onnx_has_only_the_reference(monkeypatch):
    """torch.onnx.export traces; PyTorch says that it does, so that no exporter need be installed here."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    message = "ONNX has no op for backend='cpp'; export with backend='reference', plain PyTorch"
    trace = lambda backend: torch.jit.trace(lambda v: weighted_pool3d(v, None, **WINDOW, backend=backend), VALUES)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            trace("cpp")
        assert trace("reference")(VALUES).shape == (2, 2, 2, 2, 8)
    weighted_pool3d(VALUES, None, **WINDOW, backend="cpp")  # outside of an export
