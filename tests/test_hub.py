"""The Kernel Hub folder: its variants, what they say of themselves, and that they live beside this package.

`make smoke` loads it with `kernels` itself, in an environment of its own.
"""

import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import ppllava_kernels
from hub import build
from ppllava_kernels.backends import cpp

COMPILED = build.compiled_name()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    build.main(folder)
    return folder


def load(variant):
    """As `kernels` does: under the id, from the file."""
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_variants(folder):
    variants = {path.name: path for path in (folder / "build").iterdir()}
    assert set(variants) == {"torch-cpu", "torch-cuda", COMPILED}
    assert re.fullmatch(r"torch2\d+-cxx11-(cpu|cu\d+)-\w+-linux", COMPILED)
    python = {str(path.relative_to(build.PACKAGE)) for path in build.PACKAGE.rglob("*.py")} | {"py.typed", "_C.missing"}
    ids = set()
    for name, path in variants.items():
        metadata = json.loads((path / "metadata.json").read_text())
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        extension = {Path(cpp._C.__file__).name} if name == COMPILED else set()
        assert files - python == {"metadata.json"} | extension
        assert metadata["digest"]["files"] == {file: build.digest(path / file) for file in files - {"metadata.json"}}
        assert metadata["name"] == "ppllava-kernels"
        assert metadata["version"] == 0
        assert metadata["backend"]["type"] == ("cuda" if name == "torch-cuda" or torch.version.cuda else "cpu")
        assert metadata["id"].isidentifier()
        ids.add(metadata["id"])
    assert len(ids) == 3
    assert (folder / "LICENSE").exists()
    assert (folder / "README.md").exists()


def test_kernels_takes_the_compiled_one_first(folder):
    variants = pytest.importorskip("kernels.variants", reason="kernels is not installed; make smoke has it")
    accepted, _ = variants.resolve_variants(variants.get_variants_local(folder / "build"))
    noarch = "torch-cuda" if torch.version.cuda else "torch-cpu"
    assert [variant.variant_str for variant in accepted] == [COMPILED, noarch]


def test_without_an_extension(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cpp, "missing", "the C++ extension is not there (no C++ compiler: g++ was not found); install")
    build.main(tmp_path)
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == ["torch-cpu", "torch-cuda"]
    assert capsys.readouterr().err == f"the compiled variant is left out: {cpp.missing}\n"


def test_a_variant_for_another_python_says_so(tmp_path):
    build.write(tmp_path / "variant", "cpu", "this variant of the Kernel Hub is compiled for CPython 3.9")
    kernel = load(tmp_path / "variant")
    assert kernel.why_not("cpp").startswith(
        "the C++ extension is not there (this variant of the Kernel Hub is compiled for CPython 3.9); install"
    )
    assert kernel.compatible_backends(torch.ones(1, dtype=torch.float64)) == ["reference"]


def test_a_build_with_cuda_names_its_gpus(tmp_path):
    extension = types.SimpleNamespace(__file__=cpp._C.__file__, cuda_architectures="80 90a 100 120+PTX")
    build.write(tmp_path / "variant", "cuda", "", extension)
    metadata = json.loads((tmp_path / "variant" / "metadata.json").read_text())
    assert metadata["backend"] == {"type": "cuda", "archs": ["8.0", "9.0a", "10.0", "12.0+PTX"]}


@pytest.mark.interpreter
def test_copies_beside_this_package(folder):
    """The compiled one, and Triton in the one without an extension; each registers ops of its own."""
    values, weights = torch.randn(1, 4, 6, 6, 32), torch.randn(1, 4, 6, 6)
    window = dict(kernel_size=(2, 3, 3), temperature=0.5)
    expected = ppllava_kernels.weighted_pool3d(values, weights, backend="reference", **window)
    copies = {COMPILED: ["cpp", "triton", "reference"], "torch-cuda": ["triton", "reference"]}
    for name, backends in copies.items():
        kernel = load(folder / "build" / name)
        assert kernel.compatible_backends(values) == backends
        x = values.clone().requires_grad_()
        for backend in backends:
            pooled = kernel.weighted_pool3d(x, weights, backend=backend, **window)
            torch.testing.assert_close(pooled, expected)
        pooled.sum().backward()
        assert hasattr(getattr(torch.ops, kernel.__name__), "weighted_pool3d")
    assert ppllava_kernels.library.NAMESPACE == "ppllava_kernels"


@pytest.mark.parametrize("name", ["build/of_someone_else/file", "README.md"])
def test_a_folder_of_others_is_left_alone(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    with pytest.raises(SystemExit, match="FOLDER must be new, empty, or written by this script before, got "):
        build.main(tmp_path)
    assert file.read_text() == "mine"
