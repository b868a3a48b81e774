"""Tests with a stamp run again when something has changed that they depend on, when they failed, and in CI."""

import pytest
import stamps

pytest_plugins = ["pytester"]

CONFTEST = (
    "from stamps import pytest_addoption, pytest_runtest_makereport, pytest_runtest_setup, pytest_terminal_summary"
)
TEST = """
import pathlib
import pytest

@pytest.mark.stamped("kernels", "build.txt")
@pytest.mark.parametrize("arch", ["80", "90"])
def test_compiles(arch):
    assert "broken" not in pathlib.Path("kernels/pool.cu").read_text() + pathlib.Path("flag").read_text()

def test_other():
    pass
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with two stamped tests and one without a stamp; called, it runs them and counts what came of it."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(stamps, "tools", lambda: "nvcc 13.0")
    pytester.makeini("[pytest]\nmarkers = stamped")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_kernels=TEST, helper="SIZE = 1")
    for name, text in {"kernels/pool.cu": "// a kernel", "build.txt": "flags", "flag": "", "other.txt": "x"}.items():
        (pytester.path / name).parent.mkdir(exist_ok=True)
        (pytester.path / name).write_text(text)

    def run(*options):
        stamps.digest.cache_clear()
        run.result = pytester.runpytest_inprocess(*options)
        return run.result.parseoutcomes()

    run.path = pytester.path
    assert run() == {"passed": 3}
    return run


def test_what_has_not_changed_is_skipped_and_said(project):
    (project.path / "other.txt").write_text("nothing depends on it")
    assert project() == {"passed": 1, "skipped": 2}
    project.result.stdout.fnmatch_lines(["2 tests did not run again: each passed before, * --all runs it again"])
    assert project("--all") == {"passed": 3}


@pytest.mark.parametrize("name", ["kernels/pool.cu", "kernels/new/pool.h", "build.txt", "test_kernels.py", "helper.py"])
def test_a_change_runs_them_again(project, name):
    path = project.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + "\n")
    assert project() == {"passed": 3}
    assert project() == {"passed": 1, "skipped": 2}


def test_another_compiler_runs_them_again(project, monkeypatch):
    monkeypatch.setattr(stamps, "tools", lambda: "nvcc 13.1")
    assert project() == {"passed": 3}


def test_ci_runs_them(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert project() == {"passed": 3}


def test_a_failure_leaves_no_stamp(project):
    flag = project.path / "flag"  # which no stamp covers
    flag.write_text("broken")
    assert project() == {"passed": 1, "skipped": 2}
    assert project("--all") == {"passed": 1, "failed": 2}
    assert project() == {"passed": 1, "failed": 2}
    flag.write_text("")
    assert project() == {"passed": 3}
    assert project() == {"passed": 1, "skipped": 2}


def test_a_failure_drops_the_stamp_of_what_was_before(project):
    kernel = project.path / "kernels/pool.cu"
    kernel.write_text("// broken")
    assert project() == {"passed": 1, "failed": 2}
    kernel.write_text("// a kernel")
    assert project() == {"passed": 3}


def test_without_a_cache_they_run(project):
    assert project("-p", "no:cacheprovider") == {"passed": 3}


def test_a_mark_that_names_nothing(project):
    path = project.path / "test_kernels.py"
    path.write_text(path.read_text().replace("build.txt", "no_such_file"))
    assert project() == {"passed": 1, "errors": 2}
    project.result.stdout.fnmatch_lines(["*stamped must name a file or folder of * got 'no_such_file'*"])


def test_the_versions_of_compilers_count():
    lines = stamps.tools().splitlines()
    assert f"pytest {pytest.__version__}" in lines
    assert any(line.startswith(("torch ", "no torch")) for line in lines)
