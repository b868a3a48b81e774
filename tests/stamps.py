"""Tests whose outcome hangs on a few files and on compilers alone run again only when one of these has changed.

    @pytest.mark.stamped("csrc/cuda", "setup.py")

The hash covers these files and folders, the file of the test, what the tests beside it share, and the versions of the
compilers. pytest's cache keeps it from the last time that the test passed; a failure drops it. `--all`, and CI=true in
the environment, run every test. conftest.py imports the hooks.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REASON = "passed before, and nothing that it depends on has changed since; --all runs it again"
PACKAGES = ("torch", "triton", "numpy", "pytest")
COMPILERS = ("nvcc", "g++")
LEFT_OUT = {"__pycache__", ".pytest_cache"}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run tests too whose stamp says that nothing has changed")


def pytest_runtest_setup(item):
    """Before the fixtures, which are the expensive part of some."""
    if stamped(item) and not run_all(item) and item.config.cache.get(key(item), None) == digest_of(item):
        pytest.skip(REASON)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if stamped(item):
        if report.failed:  # in its teardown, too
            item.config.cache.set(key(item), None)
        elif report.when == "call" and report.passed:
            item.config.cache.set(key(item), digest_of(item))
    return report


def pytest_terminal_summary(terminalreporter):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if REASON in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests did not run again: each {REASON}")


def stamped(item) -> bool:
    return item.get_closest_marker("stamped") is not None and hasattr(item.config, "cache")


def run_all(item) -> bool:
    return item.config.getoption("--all") or os.environ.get("CI", "").lower() in ("true", "1")


def key(item) -> str:
    return f"stamps/{hashlib.sha256(item.nodeid.encode()).hexdigest()}"


def digest_of(item) -> str:
    """Of all marks of the test: those of its module, too."""
    names = sorted({name for mark in item.iter_markers("stamped") for name in mark.args})
    return digest(item.config.rootpath, item.path, tuple(names))


@cache
def digest(root: Path, test: Path, names: tuple[str, ...]) -> str:
    paths = {test, *(path for path in test.parent.glob("*.py") if not path.name.startswith("test_"))}
    for name in names:
        found = set(files(root / name))
        if not found:
            raise FileNotFoundError(f"stamped must name a file or folder of {root}, got {name!r}; correct the mark")
        paths |= found
    total = hashlib.sha256(tools().encode())
    for path in sorted(paths):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(root).as_posix()} {content}\n".encode())
    return total.hexdigest()


def files(path: Path) -> Iterator[Path]:
    """path itself, or all in it that is not the product of a compiler."""
    if path.is_file():
        yield path
    else:
        inside = (found for found in path.rglob("*") if found.is_file() and found.suffix not in (".so", ".pyc"))
        yield from (found for found in inside if not LEFT_OUT & set(found.parts))


@cache
def tools() -> str:
    """The versions of what compiles and runs the sources."""
    versions = [platform.python_version(), platform.machine()]
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    for name in COMPILERS:
        path = shutil.which(name)
        command = [path, "--version"]
        versions.append(f"{path} {subprocess.run(command, capture_output=True, text=True).stdout if path else ''}")
    return "\n".join(versions)
