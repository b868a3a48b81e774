"""The package installs without a compiler, imports without triton, and is typed."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

ROOT = Path(__file__).parent.parent
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, **options).stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return next(folder.glob("*.tar.gz"))


def test_the_sdist_has_every_source(sdist):
    """A wheel of `make dist` is made of the checkout, whose objects are there, so that this is what tries the sdist."""
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "ppllava", "ppllava_kernels", "tests", "benchmarks"):
        sources = [path for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
        assert sources
        assert {str(path.relative_to(ROOT)) for path in sources} <= there
    assert {"setup.py", "pyproject.toml", "requirements.lock", "Makefile"} <= there


@pytest.fixture(scope="module")
def without_compiler(sdist, tmp_path_factory):
    """The folder of an installation from the sdist, made where there is no C++ compiler."""
    target = tmp_path_factory.mktemp("target")
    environment = os.environ | dict(CC="/no/such/cc", CXX="/no/such/c++")
    install = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", str(target))
    python(*install, str(sdist), env=environment)
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


@pytest.fixture
def setup_py(monkeypatch):
    """Run setup.py up to its call of setup(), and get what it defines."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return lambda: SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def test_b22_build_without_torch(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as error:
        setup_py()
    assert str(error.value) == (
        "the kernels are compiled for the installed PyTorch, and none was found (pip hides it without "
        "--no-build-isolation); install PyTorch first, then pip install --no-build-isolation . (see README, Install)"
    )


@pytest.mark.parametrize("archs", ["hopper", "100f", "80;none", "native;90"])
def test_architectures_that_nvcc_cannot_know(archs, setup_py, monkeypatch):
    """Asked for by name, so nothing else is built in their place."""
    monkeypatch.setenv("PPLLAVA_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit) as error:
        setup_py()
    assert str(error.value) == (
        f'PPLLAVA_CUDA_ARCHS must be "none", "native", or such as "80;90+PTX", got \'{archs}\'; unset it for all GPUs'
    )


def test_native_architectures(setup_py, monkeypatch):
    monkeypatch.setenv("PPLLAVA_CUDA_ARCHS", "native")
    found = [(9, 0), (12, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu: found[gpu])
    assert setup_py().ASKED == ["90", "120"]
    found.clear()
    with pytest.raises(SystemExit) as error:
        setup_py()
    assert str(error.value) == (
        "PPLLAVA_CUDA_ARCHS=native needs a GPU that PyTorch sees, got none; name what to compile for, such as "
        "PPLLAVA_CUDA_ARCHS=90, or unset it for all GPUs"
    )


NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) echo compute_80 compute_90 ;;
  *--version*) cat "$(dirname "$0")/version" ;;
  *--dryrun*) echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
  *broken*) exit 1 ;;
  *) for last; do :; done; echo object > "$last" ;;
esac
"""


@pytest.fixture
def nvcc(setup_py, tmp_path, monkeypatch):
    """setup.py in a folder with two kernels and a stand-in of nvcc; called, it builds and says what was compiled."""
    for name, text in {
        "cuda/bin/nvcc": NVCC,
        "cuda/bin/version": "release 13.0",
        "cuda/lib64/libcudart_static.a": "",
        "csrc/shapes.h": "",
        "csrc/cuda/common.cuh": "",
        "csrc/cuda/pool.cu": "",
        "csrc/cuda/project.cu": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "cuda/bin/nvcc").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("PPLLAVA_CUDA_ARCHS", raising=False)

    def build() -> tuple[set[str], str | None]:
        module = setup_py()
        extension = SimpleNamespace(library_dirs=[], libraries=[], define_macros=[])
        compilers, missing = module.start_nvcc(Path("build"), extension)
        missing = module.finish_nvcc(compilers) or missing
        return {Path(process.args[-1]).stem for process, *_ in compilers}, missing

    return build


def test_nvcc_compiles_what_has_changed(nvcc, monkeypatch):
    both = {"pool", "project"}, None
    assert nvcc() == both
    assert nvcc() == (set(), None)
    Path("csrc/cuda/pool.cu").write_text("// changed")
    assert nvcc() == ({"pool"}, None)
    for path, text in {"csrc/cuda/common.cuh": "//", "csrc/shapes.h": "//", "cuda/bin/version": "release 13.1"}.items():
        Path(path).write_text(text)
        assert nvcc() == both, path
        assert nvcc() == (set(), None)
    monkeypatch.setenv("PPLLAVA_CUDA_ARCHS", "90")
    assert nvcc() == both
    Path("build/pool.o").unlink()
    assert nvcc() == ({"pool"}, None)


def test_what_nvcc_could_not_compile_is_tried_again(nvcc):
    Path("csrc/cuda/broken.cu").write_text("")
    for again in ({"pool", "project", "broken"}, {"broken"}):
        assert nvcc() == (again, "nvcc failed when it was installed")
    Path("csrc/cuda/broken.cu").unlink()
    assert nvcc() == (set(), None)


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
    # PyTorch takes the name at its word: an instruction set that this CPU lacks would end the process.
    names = ["default", "avx2", "avx512"]
    best = torch.backends.cpu.get_cpu_capability().lower()
    for capability in names[: names.index(best) + 1] if best in names else names[:1]:
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
