"""Write `ppllava_kernels` as the folder that the `kernels` package and the Hugging Face Kernel Hub load.

python hub/build.py [FOLDER]

    FOLDER/build/torch-cpu, torch-cuda                     Python alone: the reference, and Triton on CUDA tensors
    FOLDER/build/torch213-cxx11-cpu-x86_64-linux, or such  and the extension of this installation
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import re
import shutil
import sys
from pathlib import Path

import torch

import ppllava_kernels
from ppllava_kernels.backends import cpp

HERE = Path(__file__).parent
PACKAGE = Path(ppllava_kernels.__file__).parent
NAME = "ppllava-kernels"
NOARCH = ("cpu", "cuda")  # what the noarch variants are for; `kernels` takes the one that PyTorch is built for


def main(folder: Path = HERE / NAME) -> None:
    others = [path for path in folder.glob("build/*") if not (path / "metadata.json").exists()]
    if others or (folder.exists() and any(folder.iterdir()) and not (folder / "build").exists()):
        sys.exit(f"FOLDER must be new, empty, or written by this script before, got {folder}; pass another")
    shutil.rmtree(folder / "build", ignore_errors=True)
    for backend in NOARCH:
        write(folder / "build" / f"torch-{backend}", backend, "this variant of the Kernel Hub is Python alone")
    without = ppllava_kernels.why_not("cpp") or why_no_name()
    if without is None:
        built_for = f"CPython {platform.python_version().rpartition('.')[0]} and PyTorch {minor()}"
        note = f"this variant of the Kernel Hub is compiled for {built_for}"
        write(folder / "build" / compiled_name(), "cuda" if torch.version.cuda else "cpu", note, cpp._C)
    else:
        print(f"the compiled variant is left out: {without}", file=sys.stderr)
    shutil.copy(HERE / "card.md", folder / "README.md")
    shutil.copy(HERE.parent / "LICENSE", folder)
    print(f"{folder}:", *sorted(path.name for path in (folder / "build").iterdir()))


def write(target: Path, backend: str, note: str, extension=None) -> None:
    """One variant; `note` is the reason in `why_not("cpp")` where no extension can be imported."""
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_C.missing"))
    (target / "_C.missing").write_text(note + "\n")
    archs = []
    if extension is not None:
        shutil.copy(extension.__file__, target)
        archs = [dotted(arch) for arch in getattr(extension, "cuda_architectures", "").split()]
    files = {str(path.relative_to(target)): digest(path) for path in sorted(target.rglob("*")) if path.is_file()}
    # The name of the module and the namespace of its ops: other contents, another name, in one process too.
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    metadata = {
        "id": f"_ppllava_kernels_{backend}_{unique}",
        "name": NAME,
        "version": int(ppllava_kernels.__version__.partition(".")[0]),
        "kernels-minver": "0.17.0",
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend} | ({"archs": archs} if archs and backend == "cuda" else {}),
        "digest": {"algorithm": "sha256", "files": files},
    }
    (target / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def why_no_name() -> str | None:
    if sys.platform != "linux" or torch.version.hip:
        here = f"PyTorch {torch.__version__} on {sys.platform}"
        return f"it is written for CPU and CUDA builds of PyTorch on Linux, and this is {here}"
    return None


def minor() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def compiled_name() -> str:
    """As `kernels` looks for it: it takes the same minor of PyTorch, and the same major of CUDA with no later minor."""
    abi = "cxx11" if torch.compiled_with_cxx11_abi() else "cxx98"
    backend = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
    return f"torch{minor().replace('.', '')}-{abi}-{backend}-{platform.machine()}-linux"


def dotted(arch: str) -> str:
    """ "120+PTX" -> "12.0+PTX"."""
    return re.sub(r"^(\d+)(\d)", r"\1.\2", arch)


def digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
