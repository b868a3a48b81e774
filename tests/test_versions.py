"""The lock fits pyproject.toml and is what was installed; the newest and the oldest are what pip is asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import versions
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def environment(python: str) -> dict[str, str]:
    return versions.TRIED | {"python_version": python, "python_full_version": f"{python}.0"}


@pytest.mark.parametrize("python", PYTHONS)
def test_every_locked_version_is_in_its_range(python):
    """README promises these versions of Python: each finds all of its packages in the lock."""
    lock, required = versions.locked(environment(python)), versions.required(environment(python))
    assert {"torch", "transformers", "torchao", "av", "setuptools", "torchvision", "kernels", "uv"} <= required.keys()
    assert required.keys() <= lock.keys()
    for name, requirement in required.items():
        assert requirement.specifier.contains(lock[name]), f"{requirement}, locked: {lock[name]}"


def test_the_lock_holds_versions_alone():
    """No host of an index, no path, no local label of one build, and one version of each for any environment."""
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.url is None, line
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
    for python in PYTHONS:
        here = environment(python)
        lines = [Requirement(x) for x in (ROOT / "requirements.lock").read_text().splitlines() if x[0] != "#"]
        names = [requirement.name for requirement in lines if versions.holds(requirement, here)]
        assert len(names) == len(set(names)), python


def test_what_is_tried_has_a_floor_and_a_ceiling():
    required = versions.required()
    for name in ("transformers", "torchao"):
        operators = {clause.operator for clause in required[name].specifier}
        assert operators == {">=", "<"}, required[name]
        locked, ceiling = (Version(versions.locked()[name]), _clause(required[name], "<"))
        assert (ceiling.major, ceiling.minor) == (locked.major, locked.minor + 1), "the first minor that was not tried"


def _clause(requirement: Requirement, operator: str) -> Version:
    return next(Version(clause.version) for clause in requirement.specifier if clause.operator == operator)


def test_the_environment_is_the_lock():
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("this Python is not of the environment that `make test` makes; run `make test`")
    lock = versions.locked()
    installed = {name: x for name, x in versions.installed().items() if name not in (versions.PROJECT, "pip")}
    assert installed == {name: lock.get(name) for name in installed}
    assert versions.of_tests().keys() | {"torch", "setuptools", "pybind11", "ninja"} <= installed.keys()
    assert versions.differences() == []


def test_pip_installs_nothing_but_the_lock():
    makefile = (ROOT / "Makefile").read_text()
    lines = [line.strip() for line in makefile.replace("\\\n", " ").splitlines()]
    pip, bound, *rest = (line for line in lines if "pip install" in line or "$(PIP)" in line)
    assert pip == "PIP := python -m pip install --quiet"
    assert bound == "LOCKED := $(PIP) --constraint requirements.lock"
    assert {line.partition("$(PIP)")[0] for line in rest} == {"$(VENV)/newest/bin/", "$(VENV)/oldest/bin/"}
    for file in (*(ROOT / ".ci").iterdir(), ROOT / "tests/smoke.py"):
        text = file.read_text().replace('", "', " ")
        assert text.count("pip install") == text.count("pip install --quiet --constraint"), file.name


def test_newest_has_no_bounds_and_oldest_the_floors():
    newest, oldest = map(Requirement, ("transformers", "av==17.1"))
    assert {str(newest), "ray[data]", "pytest"} <= set(versions.newest())
    assert all(not Requirement(line).specifier for line in versions.newest())
    assert "torch" not in versions.newest()  # which the Makefile pins
    assert {str(oldest), "transformers==5.19", "torchao==0.18"} == set(versions.oldest())


def test_differences_are_named(monkeypatch):
    lock = versions.locked()
    changed = dict(transformers="5.99.0", torch=lock["torch"], something_else="1.0")
    monkeypatch.setattr(versions, "installed", lambda: changed)
    assert versions.differences() == [f"transformers 5.99.0 (locked: {lock['transformers']})"]


def test_an_environment_above_another(tmp_path):
    """It has the packages of this one, and its own before them."""
    packages = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for folder, text in (
        ("typer", ""),
        ("typer-99.0.dist-info", "Metadata-Version: 2.1\nName: typer\nVersion: 99.0\n"),
    ):
        (packages / folder).mkdir(parents=True)
        (packages / folder / ("METADATA" if text else "__init__.py")).write_text(text)
    versions.overlay(tmp_path)
    program = (
        f"import site; site.addsitedir({str(packages)!r})\n"
        "import versions, typer, packaging; print(versions.differences(), typer.__file__, packaging.__file__, sep='|')"
    )
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", check=True)
    differences, typer, packaging = done.stdout.strip().split("|")
    assert f"typer 99.0 (locked: {versions.locked()['typer']})" in differences
    assert Path(typer).parent == packages / "typer"
    assert Path(packaging).parent.parent != packages


def test_readme_names_them():
    line = versions.readme_line()
    assert versions.BLOCK.search((ROOT / "README.md").read_text())[0] == line, "run `make lock`"
    assert f"transformers {versions.locked(versions.TRIED)['transformers']}" in line
    assert "`make test-oldest` with transformers 5.19," in line
