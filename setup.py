"""Builds the C++ and CUDA kernels; everything else is in pyproject.toml. Without a compiler the package still installs.

PPLLAVA_CUDA_ARCHS chooses what nvcc compiles for, for example "80;90" or "90+PTX"; "native" is what the GPUs here are,
and "none" leaves CUDA out.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(
        "the kernels are compiled for the installed PyTorch, and none was found (pip hides it without "
        "--no-build-isolation); install PyTorch first, then pip install --no-build-isolation . (see README, Install)"
    )

KERNELS = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CUDA_KERNELS = sorted(Path("csrc/cuda").glob("*.cu"))
NOTE = Path("ppllava_kernels/_C.missing")  # read by ppllava_kernels/backends/cpp.py
X86 = platform.machine().lower() in ("x86_64", "amd64")

# Each kernel is compiled once per instruction set, as ATen compiles its own; bindings.cpp picks at run time.
CAPABILITIES = {"DEFAULT": []}
if X86:
    CAPABILITIES["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    CAPABILITIES["AVX512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]

# With gcc -fopenmp is for the compiler alone: the extension then shares PyTorch's own OpenMP threads instead of linking
# a second runtime. What clang makes of it needs clang's runtime.
FLAGS = ["-O3", "-g0", "-fvisibility=hidden"] + (["-fopenmp"] if sys.platform == "linux" else [])


LINK = ["-fopenmp"] if sys.platform == "linux" and "clang" in get_cxx_compiler() else []

# What PyTorch itself is built for, as far as this nvcc knows it, and PTX of the newest for GPUs to come.
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


def find_nvcc() -> Path | None:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    found = [home / "bin" / "nvcc" for home in (*homes, Path("/usr/local/cuda"))]
    found.insert(len(homes), Path(shutil.which("nvcc") or "/no/nvcc/on/the/path"))
    return next((path for path in found if path.exists()), None)


def asked_archs() -> list[str]:
    """PPLLAVA_CUDA_ARCHS as a list: empty for the default, ["none"] for no CUDA."""
    words = os.environ.get("PPLLAVA_CUDA_ARCHS", "").strip().lower()
    archs = [word.replace(".", "") for word in re.split(r"[;,\s]+", words) if word]
    if archs == ["native"]:
        return native_archs()
    for arch in archs:
        if archs != ["none"] and not re.fullmatch(r"\d{2,3}a?(\+ptx)?", arch):
            allowed = '"none", "native", or such as "80;90+PTX"'
            sys.exit(f"PPLLAVA_CUDA_ARCHS must be {allowed}, got {words!r}; unset it for all GPUs")
    return [arch.replace("ptx", "PTX") for arch in archs]


def native_archs() -> list[str]:
    gpus = range(torch.cuda.device_count())
    if not gpus:
        sys.exit(
            "PPLLAVA_CUDA_ARCHS=native needs a GPU that PyTorch sees, got none; name what to compile for, such as "
            "PPLLAVA_CUDA_ARCHS=90, or unset it for all GPUs"
        )
    return sorted({"{}{}".format(*torch.cuda.get_device_capability(gpu)) for gpu in gpus}, key=int)


def default_archs(nvcc: Path) -> list[str]:
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known]
    return [*archs[:-1], archs[-1] + "+PTX"]


def toolkit(nvcc: Path) -> Path:
    """Where it lies; nvcc itself may be a script or a link that stands elsewhere."""
    report = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    return Path(re.search(r"^#\$ TOP=(.+)$", report, re.MULTILINE)[1].strip())


def nvcc_release(nvcc: Path) -> str:
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", report)[1]


def gencode(arch: str) -> list[str]:
    number, _, ptx = arch.partition("+")
    targets = [f"sm_{number}", *([f"compute_{number}"] if ptx else [])]
    return [f"-gencode=arch=compute_{number},code=[{','.join(targets)}]"]


def start_nvcc(folder: Path, extension) -> tuple[list[tuple[subprocess.Popen, Path, str]], str | None]:
    """Start to compile the CUDA kernels, with or without a GPU or a CUDA build of PyTorch; or why that cannot be.

    For each whose object is not there, as made of the same: the process, and the file to write its fingerprint to.
    """
    nvcc = find_nvcc()
    if ASKED == ["none"]:
        return [], "PPLLAVA_CUDA_ARCHS=none when it was installed"
    if nvcc is None:
        return [], "there was no nvcc when it was installed"
    try:
        archs, release, home = ASKED or default_archs(nvcc), nvcc_release(nvcc), toolkit(nvcc)
    except (OSError, subprocess.CalledProcessError, IndexError, TypeError):
        return [], "nvcc did not say what it is when it was installed"
    folders = [home / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    libraries = [path for path in folders if (path / "libcudart_static.a").exists()]
    if not libraries:
        return [], "nvcc came without libcudart_static.a when it was installed"
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "--threads=0", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    flags += [flag for arch in archs for flag in gencode(arch)]
    compilers = []
    for source in CUDA_KERNELS:
        target = cuda_object(folder, source)
        command = [str(nvcc), *flags, "-c", str(source), "-o", str(target)]
        record, made_of = target.with_suffix(".made_of"), fingerprint(source, command, release)
        if target.exists() and record.exists() and record.read_text() == made_of:
            continue
        record.unlink(missing_ok=True)
        print(*command, flush=True)
        compilers.append((subprocess.Popen(command), record, made_of))
    extension.library_dirs.append(str(libraries[0]))
    # The runtime is linked in, so that nothing of CUDA is needed to import this on a machine without it.
    extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
    macros = {"ARCHS": " ".join(archs), "VERSION": release}
    extension.define_macros += [("PPLLAVA_WITH_CUDA", None)]
    extension.define_macros += [(f"PPLLAVA_CUDA_{name}", f'"{value}"') for name, value in macros.items()]
    return compilers, None


def finish_nvcc(compilers: list[tuple[subprocess.Popen, Path, str]]) -> str | None:
    """Wait for what start_nvcc started; why there are no CUDA kernels, if one of them failed."""
    failed = False
    for process, record, made_of in compilers:
        if process.wait() == 0:
            record.write_text(made_of)
        else:
            failed = True
    return "nvcc failed when it was installed" if failed else None


def cuda_object(folder: Path, source: Path) -> Path:
    return folder / source.with_suffix(".o").name


def fingerprint(source: Path, command: list[str], release: str) -> str:
    """Of all that an object of nvcc depends on."""
    digest = hashlib.sha256(repr((command, release)).encode())
    for path in (source, *sorted(Path("csrc").glob("*.h")), *sorted(Path("csrc/cuda").glob("*.*h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


ASKED = asked_archs()


class BuildKernels(BuildExtension):
    def finalize_options(self):
        """Objects stay in build/, for the next build; in an editable installation setuptools would delete them."""
        super().finalize_options()
        name = f"objects-{sys.implementation.cache_tag}-{platform.machine()}-torch-{torch.__version__}"
        self.build_temp = str(Path("build") / name)

    def run(self):
        NOTE.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            compiler = get_cxx_compiler()
            reason = (
                f"{compiler} failed: {str(error).strip().splitlines()[-1]}"
                if shutil.which(compiler)
                else f"no C++ compiler: {compiler} was not found"
            )
            sys.stderr.write(f"warning: ppllava_kernels._C is left out: {reason}\n")
            NOTE.write_text(reason + "\n")
            if not (self.editable_mode or self.inplace):
                self.copy_file(str(NOTE), str(Path(self.build_lib) / NOTE))

    def build_extension(self, extension):
        """nvcc works beside the C++ compiler; where it fails, all but CUDA is built."""
        folder = Path(self.build_temp) / "cuda"
        nvccs, missing = start_nvcc(folder, extension)
        try:
            self.build_cpu(extension)
        except BaseException:
            for process, *_ in nvccs:
                process.kill()
            raise
        missing = finish_nvcc(nvccs) or missing
        if missing is None:
            extension.sources.append("csrc/bindings_cuda.cpp")
            extension.extra_objects += [str(cuda_object(folder, source)) for source in CUDA_KERNELS]
        else:
            sys.stderr.write(f"warning: the CUDA kernels are left out: {missing}\n")
            extension.define_macros = [("PPLLAVA_CUDA_MISSING", f'"{missing}"')]
        super().build_extension(extension)

    def build_cpu(self, extension):
        for name, flags in CAPABILITIES.items():
            extension.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=extension.include_dirs,
                extra_postargs=[*FLAGS, *flags, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"],
                depends=extension.depends,
            )


setup(
    ext_modules=[
        CppExtension(
            "ppllava_kernels._C",
            ["csrc/bindings.cpp"],
            extra_compile_args=FLAGS + (["-DPPLLAVA_X86"] if X86 else []),
            extra_link_args=LINK,
            depends=[str(path) for path in Path("csrc").rglob("*.*")],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
