"""pytest-xdist leaves the tests of a file that shares a run to one worker."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="needs workers of pytest-xdist; run pytest -n 2")
@pytest.mark.parametrize("number", range(8))
def test_one_worker_has_them_all(number):
    seen = Path(os.environ["PPLLAVA_TEST_TRUTHS"]) / "workers of test_scheduling"
    with seen.open("a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + "\n")
    assert len(set(seen.read_text().split())) == 1


def test_files_that_are_named_are_there():
    scheduling = pytest.importorskip("scheduling", reason="needs pytest-xdist; pip install pytest-xdist")
    assert [name for name in scheduling.TOGETHER if not [*ROOT.rglob(name)]] == []
