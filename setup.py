"""Builds the C++ kernels; everything else is in pyproject.toml. Without a compiler the package still installs."""

import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler

KERNELS = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
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


class BuildKernels(BuildExtension):
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
            if not self.editable_mode:
                self.copy_file(str(NOTE), str(Path(self.build_lib) / NOTE))

    def build_extension(self, extension):
        for name, flags in CAPABILITIES.items():
            extension.extra_objects += self.compiler.compile(
                KERNELS,
                output_dir=str(Path(self.build_temp) / name),
                include_dirs=extension.include_dirs,
                extra_postargs=[*FLAGS, *flags, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"],
                depends=extension.depends,
            )
        super().build_extension(extension)


setup(
    ext_modules=[
        CppExtension(
            "ppllava_kernels._C",
            ["csrc/bindings.cpp"],
            extra_compile_args=FLAGS + (["-DPPLLAVA_X86"] if X86 else []),
            extra_link_args=LINK,
            depends=[str(path) for path in Path("csrc").rglob("*.h")],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
