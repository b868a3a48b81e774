"""ppllava_kernels._C with the CUDA kernels compiled for this CPU, for tests alone.

    build_cpu(folder)                folder/_C.so of the CPU kernels alone, under ASan
    build(folder)                    folder/_C.so under ASan and UBSan; races=True: with the check of races instead
    environment(folder)              what a process needs in its environment to load it
    load(folder)                     in that process, before ppllava_kernels is imported: the module in place of its _C

From a shell: python -m cuda_on_host.build FOLDER [--races] in tests/, and then
env $(python -m cuda_on_host.build --environment FOLDER) python ...
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FOLDER = HERE.parent.parent / "build/cuda_on_host"  # where tests build, once for all of their processes
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMMON = ["-std=c++20", "-g", "-fPIC", "-fno-omit-frame-pointer", "-DPPLLAVA_CUDA_ON_HOST"]


def cuda_include() -> Path | None:
    """The toolkit's headers, from nvcc, CUDA_HOME, NVIDIA's or Triton's wheels; the compiler itself is not needed."""
    folders = []
    if nvcc := shutil.which("nvcc"):
        report = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], stderr=subprocess.PIPE, text=True, check=False).stderr
        top = [line.partition("=")[2].strip() for line in report.splitlines() if line.startswith("#$ TOP=")]
        folders += [Path(path) / "include" for path in top]
        folders.append(Path(nvcc).resolve().parent.parent / "include")
    folders += [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(Path("/usr/local/cuda/include"))
    packages = Path(sysconfig.get_path("purelib"))
    folders += sorted(packages.glob("nvidia/*/include"))
    folders.append(packages / "triton/backends/nvidia/include")
    return next(
        (path for path in folders if (path / "cuda_bf16.h").exists() and (path / "vector_types.h").exists()), None
    )


def why_not() -> str | None:
    if not shutil.which("g++"):
        return "the CUDA kernels run on the CPU where g++ is found; install g++ 12 or newer"
    if not cuda_include():
        return (
            "the CUDA kernels run on the CPU where CUDA's headers are found; install the toolkit, or pip install triton"
        )
    return None


def build(folder: Path, sanitize: bool = True, races: bool = False) -> Path:
    _check()
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    python = [sysconfig.get_path("include"), *include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    module = [
        "-DPPLLAVA_WITH_CUDA",
        '-DPPLLAVA_CUDA_ARCHS="90a"',
        '-DPPLLAVA_CUDA_VERSION="13.0"',
        "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H",
        abi,
    ]
    module += ["-O1", "-g0", "-fvisibility=hidden"] + [f"-isystem{path}" for path in python]
    cpu = ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", "-fopenmp", *module]
    # Without any check, so one for all; they take longest.
    shared = [(CSRC / name, module) for name in ("bindings.cpp", "bindings_cuda.cpp")]
    shared += [(path, cpu) for path in sorted((CSRC / "cpu").glob("*.cpp"))]
    sources = [(path, _kernel_flags(sanitize, races)) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    sources += _shim(sanitize, races)
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    flags = ["-shared", *_link_flags(sanitize, races), *libraries]
    return _make(folder, "_C.so", sources, flags, _objects(FOLDER / "shared", shared))


def build_cpu(folder: Path) -> Path:
    """The CPU kernels alone, under ASan, for the plain instruction set and one of vectors."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    common = ["-std=c++17", "-O1", "-g1", "-fopenmp", "-fsanitize=address", "-fvisibility=hidden", abi]
    common += ["-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H", '-DPPLLAVA_CUDA_MISSING="a fuzzer"']
    common += [f"-isystem{path}" for path in (sysconfig.get_path("include"), *include_paths())]
    sets = {"DEFAULT": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
        common += ["-DPPLLAVA_X86", "-DPPLLAVA_AVX512=AVX2"]
    sources = [(CSRC / "bindings.cpp", common)]
    for name, flags in sets.items():
        these = [*common, *flags, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
        sources += [(path, these, f"{name}.") for path in sorted((CSRC / "cpu").glob("*.cpp"))]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    return _make(folder, "_C.so", sources, ["-shared", "-fsanitize=address", *libraries])


def build_selftest(folder: Path, sanitize: bool = True, races: bool = False) -> Path:
    """An executable of selftest.cu."""
    _check()
    sources = [(HERE / "selftest.cu", _kernel_flags(sanitize, races)), *_shim(sanitize, races)]
    return _make(folder, "selftest", sources, _link_flags(sanitize, races))


def environment(folder: Path) -> dict[str, str]:
    """Of a process that loads folder/_C.so: ASan must come before all else, and C++ exceptions with it."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    needed = subprocess.run(["ldd", folder / "_C.so"], stdout=subprocess.PIPE, text=True, check=True).stdout
    if "libasan" in needed:
        options["LD_PRELOAD"] = ":".join(_library(name) for name in ("libasan.so", "libstdc++.so"))
    return options


def load(folder: Path):
    if "ppllava_kernels" in sys.modules:
        raise RuntimeError("load the kernels before ppllava_kernels is imported")
    import torch  # noqa: F401  whose libraries the module needs

    loader = importlib.machinery.ExtensionFileLoader("ppllava_kernels._C", str(folder / "_C.so"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    sys.modules[loader.name] = module
    return module


def _check() -> None:
    if reason := why_not():
        raise RuntimeError(reason)


def _kernel_flags(sanitize: bool, races: bool) -> list[str]:
    checks = ["-fsanitize=thread"] if races else SANITIZE if sanitize else []
    return [*_shim_flags(), "-O1", *checks, f"-I{CSRC / 'cuda'}", "-xc++"]


def _shim_flags() -> list[str]:
    include = cuda_include()
    # Triton's copy of the headers lacks <nv/target>.
    toolkit = [] if (include / "nv/target").exists() else [f"-I{HERE / 'without_toolkit'}"]
    cccl = [f"-isystem{include / 'cccl'}"] if (include / "cccl").exists() else []
    return [f"-I{HERE}", *toolkit, f"-isystem{include}", *cccl]


def _shim(sanitize: bool, races: bool) -> list[tuple[Path, list[str]]]:
    checks = ["-DCUDA_ON_HOST_RACES"] if races else ["-fsanitize=address"] if sanitize else []
    names = ["scheduler.cpp", "settings.cpp"] + (["races.cpp"] if races else [])
    return [(HERE / name, [*_shim_flags(), "-O1", *checks]) for name in names]


def _link_flags(sanitize: bool, races: bool) -> list[str]:
    return SANITIZE if sanitize and not races else []


def _library(name: str) -> str:
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _make(folder: Path, name: str, sources: list[tuple], flags: list[str], others: Sequence[Path] = ()) -> Path:
    """folder/name of the sources and of other objects: each source with its flags and, where it is compiled twice, a
    name of its own."""
    folder = Path(folder).resolve()
    objects = [*_objects(folder, sources), *others]
    with _only_one(folder):
        _run(["g++", "-o", folder / name, *objects, *flags], folder / name, objects)
    return folder / name


def _objects(folder: Path, sources: list[tuple]) -> list[Path]:
    # A worker of pytest-xdist has one core.
    threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
    with _only_one(folder), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda source: _object(folder, *source), sources))


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Processes that want the same wait for each other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _object(folder: Path, source: Path, flags: list[str], name: str = "") -> Path:
    target = folder / f"{name}{source.name}.o"
    depends = target.with_suffix(".d")
    inputs = []
    if depends.exists():
        inputs = shlex.split(depends.read_text().replace("\\\n", " ").partition(":")[2])
    command = ["g++", *COMMON, *flags, "-MD", "-MF", depends, "-c", source, "-o", target]
    _run(command, target, [source, *map(Path, inputs)])
    return target


def _run(command: list, target: Path, inputs: list[Path]) -> None:
    """The command, unless it was the last one for this target and no input is newer; one that failed leaves none."""
    text = shlex.join(map(str, command))
    record = target.with_name(target.name + ".command")
    if record.exists() and target.exists() and record.read_text() == text:
        made = target.stat().st_mtime_ns
        if all(path.exists() and path.stat().st_mtime_ns < made for path in inputs):
            return
    record.unlink(missing_ok=True)
    run = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode:
        raise RuntimeError(f"{text}\n{run.stdout}")
    record.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--races", action="store_true")
    parser.add_argument("--environment", action="store_true", help="print it, and build nothing")
    arguments = parser.parse_args()
    if arguments.environment:
        sys.stdout.write("\n".join(f"{name}={value}" for name, value in environment(arguments.folder).items()) + "\n")
    else:
        sys.stdout.write(f"{build(arguments.folder, races=arguments.races)}\n")
