"""The package installs without a compiler, imports without triton, and is typed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGED = (
    "csrc",
    "ppllava",
    "ppllava_command.py",
    "ppllava_kernels",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
)


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def without_compiler(tmp_path_factory):
    """The folder of an installation made where there is no C++ compiler."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in PACKAGED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        extra = dict(ignore=shutil.ignore_patterns("*.so", "__pycache__")) if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **extra)
    environment = os.environ | dict(CC="/no/such/cc", CXX="/no/such/c++")
    install = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", str(target))
    python(*install, str(source), env=environment)
    return target


def test_install_without_a_compiler(without_compiler):
    script = (
        # The editable install of this checkout would lend its extension.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import torch, ppllava_kernels as p; print(p.__file__); print(p.why_not('cpp'));"
        "print(p.weighted_pool3d(torch.ones(1, 2, 3, 3, 4), None, kernel_size=(2, 3, 3)).shape)"
    )
    environment = os.environ | dict(PYTHONPATH=str(without_compiler))
    file, reason, shape = python("-c", script, cwd=without_compiler, env=environment).splitlines()
    assert file.startswith(str(without_compiler))
    assert reason == (
        "the C++ extension is not there (no C++ compiler: /no/such/c++ was not found); install a C++17 compiler, then "
        "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir . in the folder of the sources"
    )
    assert shape == "torch.Size([1, 1, 1, 1, 4])"


@pytest.mark.parametrize("archs", ["hopper", "100f", "80;none"])
def test_architectures_that_nvcc_cannot_know(archs):
    """Asked for by name, so nothing else is built in their place."""
    environment = os.environ | dict(PPLLAVA_CUDA_ARCHS=archs)
    command = [sys.executable, "setup.py", "--version"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    expected = f'PPLLAVA_CUDA_ARCHS must be "none" or such as "80;90+PTX", got \'{archs}\'; unset it for all GPUs'
    assert run.stderr.strip() == expected


def test_nothing_heavy_is_imported():
    """Neither triton nor transformers nor the model; no compiler runs and no GPU is looked for."""
    script = (
        "import sys, torch; before = set(sys.modules); import ppllava_kernels;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'triton', 'transformers', 'ppllava', 'numpy', 'subprocess'}), torch.cuda.is_initialized())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    assert python("-c", script, env=environment).strip() == "[] False"


def test_every_instruction_set_gives_the_same_answers():
    """The kernels are compiled several times; ATEN_CPU_CAPABILITY picks one, as for PyTorch's own."""
    script = (
        "import torch; torch.manual_seed(0); import ppllava_kernels as p;"
        "v, x, c = torch.randn(1, 4, 6, 6, 77), torch.randn(1, 4, 6, 6, 33), torch.randn(1, 33);"
        "inputs = [t.to(d).requires_grad_() for t in (v, x, c) for d in (torch.float32,)];"
        "y = p.prompt_guided_pool3d(*inputs, kernel_size=(2, 3, 3), backend='cpp'); y.square().sum().backward();"
        "z = p.weighted_pool3d(v.bfloat16(), None, kernel_size=(2, 3, 3), backend='cpp').float();"
        "print(torch.backends.cpu.get_cpu_capability(), *(t.detach().double().norm().item() for t in "
        "(y, z, *(t.grad for t in inputs))))"
    )
    runs = {}
    for capability in ("default", "avx2", "avx512"):
        found, *norms = python("-c", script, env=os.environ | dict(ATEN_CPU_CAPABILITY=capability)).split()
        runs[found] = [float(n) for n in norms]
    assert "DEFAULT" in runs
    for norms in runs.values():
        assert norms == pytest.approx(runs["DEFAULT"], rel=1e-4)


def test_two_copies_of_the_package_live_side_by_side(tmp_path):
    """As the Kernel Hub loads it, under another name: relative imports only, and a namespace of its own."""
    shutil.copytree(ROOT / "ppllava_kernels", tmp_path / "another_name")
    script = (
        "import torch, ppllava_kernels, another_name; x = torch.randn(1, 2, 3, 3, 4);"
        "a, b = (p.weighted_pool3d(x, None, kernel_size=(2, 3, 3), backend=backend)"
        " for p, backend in ((ppllava_kernels, 'cpp'), (another_name, None)));"
        "torch.testing.assert_close(a, b); print(another_name.library.NAMESPACE)"
    )
    assert python("-c", script, env=os.environ | dict(PYTHONPATH=str(tmp_path))).strip() == "another_name"
    for file in (ROOT / "ppllava_kernels").rglob("*.py"):
        text = file.read_text()
        assert "import ppllava" not in text, file
        assert "from ppllava" not in text, file


def test_one_file_per_op_and_backend():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    if not tracked:
        pytest.skip("not a git checkout; run in one")
    for op in ("prompt_relevance", "weighted_pool3d"):
        assert sorted(name for name in tracked if op in name) == [
            f"csrc/cpu/{op}.cpp",
            f"csrc/cuda/{op}.cu",
            f"ppllava_kernels/backends/triton/{op}.py",
            f"tests/test_{op}.py",
        ]


def test_public_interface_is_typed_and_documented():
    import ppllava_kernels

    assert (ROOT / "ppllava_kernels" / "py.typed").exists()
    for name in ppllava_kernels.__all__:
        thing = getattr(ppllava_kernels, name)
        assert thing.__doc__, name
        function = thing.__init__ if isinstance(thing, type) else thing
        assert "return" in function.__annotations__, name
