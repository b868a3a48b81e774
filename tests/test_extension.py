"""The compiled extension that is not there, does not load, or was built for another PyTorch: what is said, and when."""

import re
import shutil
import subprocess
import sys
import sysconfig
import warnings

import pytest
import torch

import ppllava_kernels
from ppllava_kernels import checks, extension
from ppllava_kernels.backends import cpp

REMEDY = "pip install --no-build-isolation --force-reinstall --no-deps --no-cache-dir . in the folder of the sources"
VALUES = torch.randn(1, 2, 3, 3, 4)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package without an extension, and its folder."""
    folder = tmp_path / "some_kernels"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_kernels"]:
        del sys.modules[name]


@pytest.mark.skipif(not shutil.which("g++"), reason="an extension is compiled with g++; install it")
def test_b22_an_extension_for_another_pytorch(package):
    """As after pip install -U torch: a symbol that it wants is gone."""
    source = package / "_C.cpp"
    source.write_text("""
        extern "C" void symbol_of_an_older_torch();
        extern "C" const char built[] = "ppllava_kernels was built for PyTorch 2.10.0";
        extern "C" void* PyInit__C() { symbol_of_an_older_torch(); return nullptr; }
    """)
    file = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(file)], check=True)
    module, reason = extension.load("some_kernels", package)
    assert reason == (
        f"the C++ extension does not load ({file}: undefined symbol: symbol_of_an_older_torch): it was built for "
        f"PyTorch 2.10.0 and this is {torch.__version__}; rebuild it for this one: {REMEDY}"
    )
    with pytest.raises(
        RuntimeError, match=f"^weighted_pool3d of the compiled backends cannot run: {re.escape(reason)}"
    ):
        module.weighted_pool3d()


def test_an_extension_that_is_no_library(package):
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"")
    assert f"; it is damaged, or of another machine: {REMEDY}" in extension.load("some_kernels", package)[1]


def test_an_extension_that_was_not_built(package):
    (package / "_C.missing").write_text("no C++ compiler: g++ was not found\n")
    expected = (
        "the C++ extension is not there (no C++ compiler: g++ was not found); install a C++17 compiler, then "
    ) + REMEDY
    assert extension.load("some_kernels", package)[1] == expected


@pytest.mark.parametrize(("built", "warns"), [("2.10.1", True), (torch.__version__, False)])
def test_an_extension_that_loads_beside_another_pytorch(package, built, warns):
    (package / "_C.py").write_text(f"torch_version = {built!r}\n")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module, reason = extension.load("some_kernels", package)
    assert reason is None
    assert module.torch_version == built
    expected = (
        f"the C++ extension was built for PyTorch 2.10.1 and this is {torch.__version__}; rebuild it for this one: "
    )
    assert [str(x.message) for x in seen] == [expected + REMEDY] * warns


def test_this_extension_says_what_it_was_built_for():
    from pathlib import Path

    version = torch.__version__.partition("+")[0]
    assert cpp._C.torch_version == version
    assert extension.built_for(Path(cpp._C.__file__)) == version


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(cpp, "missing", "the C++ extension is not there")
    for name in ("triton", "cuda"):
        monkeypatch.setattr(checks.backends.BACKENDS[name], "why_not", lambda *tensors: "it is not there")
    monkeypatch.setattr(checks, "_warned", set())


def test_the_reference_says_once_that_it_is_slow(without_extension):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            ppllava_kernels.weighted_pool3d(VALUES, None, kernel_size=2)
        ppllava_kernels.prompt_relevance(VALUES, torch.randn(1, 4))
    assert [str(x.message) for x in seen] == [
        "the ops of ppllava_kernels run in plain PyTorch on cpu tensors, which is many times slower. cpp: the C++ "
        "extension is not there. Pass backend='reference' where that is wanted"
    ]
    assert seen[0].filename == __file__


def test_the_reference_that_was_asked_for_says_nothing(without_extension):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ppllava_kernels.weighted_pool3d(VALUES, None, kernel_size=2, backend="reference")
        ppllava_kernels.weighted_pool3d(VALUES.to("meta"), None, kernel_size=2)  # nothing is computed there
