"""Where the rows of a benchmark go, which of them are believed, and what a command says in the end."""

import argparse
import json
import logging
import subprocess

import pytest

from benchmarks import machine, report, results
from benchmarks.load import Load
from benchmarks.report import Outcome
from benchmarks.results import Results, chosen
from benchmarks.steps_report import StepRow

CPU, GPU = ({"type": kind, "cores": cores, "device": "Test 1"} for kind, cores in (("cpu", 2), ("cuda", 16)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The committed results of this device."""
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path)
    folder = tmp_path / "cpu-test-1-2-cores"
    folder.mkdir()
    (folder / "steps.json").write_text("committed")
    return folder


def made(count=10, **changes):
    rows = [
        StepRow(step=str(n), switch="always", kept=True, samples=2, before_s=1.0, after_s=1.0) for n in range(count)
    ]
    for name, value in changes.items():
        setattr(rows[0], name, value)
    return rows


def finished(rows, options=(), out=None):
    with Results("steps", CPU, out, options) as file:
        file.save({}, rows)
        return file.close(rows)


def test_a_whole_run_replaces_the_results_at_its_end(folder):
    with Results("steps", CPU, None, []) as file:
        file.save({}, made(2))
        assert (folder / "steps.json").read_text() == "committed"
        file.save({}, made())
        path, said = file.close(made())
    assert path == folder / "steps.json"
    assert said == f"wrote {path}"
    assert len(report.read(path, "steps")["rows"]) == 10
    assert [x.name for x in folder.rglob("*") if x.is_file()] == ["steps.json"]  # nothing stays beside it


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, ["--quick"], "a run with --quick does not replace the results that README shows"),
        ({}, ["--preset", "--frames"], "a run with --preset --frames does not replace the results that README shows"),
        ({"load": Load(10.0, 3.0)}, [], "2 of its 10 rows failed, are wrong, or are marked with ?; the results that"),
        ({"samples": 1}, [], "2 of its 10 rows failed, are wrong, or are marked with ?; the results that README shows"),
        ({"status": "wrong"}, [], "2 of its 10 rows failed, are wrong, or are marked with ?; the results that README"),
    ],
)
def test_a_run_that_says_less_goes_to_a_folder_of_its_own(folder, tmp_path, changes, options, said):
    rows = made(**changes)
    rows[1].status = "ok" if options else "failed"
    path, sentence = finished(rows, options)
    assert path == folder / "unofficial" / "steps.json"
    assert sentence.startswith(f"wrote {path}: {said}")
    assert (folder / "steps.json").read_text() == "committed"
    assert finished(rows, options, tmp_path / "here") == (
        tmp_path / "here" / "steps.json",
        f"wrote {tmp_path / 'here' / 'steps.json'}",
    )


def test_one_row_in_ten_may_be_marked(folder):
    rows = made(samples=1)
    path, _ = finished(rows)
    assert path == folder / "steps.json"
    [row, *others] = report.read(path, "steps")["rows"]
    assert row["doubts"] == {"samples": "one sample"}
    assert all(other["doubts"] == {} for other in others)
    for row in rows:
        row.fail("too late", "left out")
    assert report.believable(rows, CPU) == "no row has times"


def test_ctrl_c_ends_in_one_line(folder, capsys):

    def stopped():
        with Results("steps", CPU, None, []) as file:
            file.save({}, made(3))
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as error:
        stopped()
    assert error.value.code == 130
    partial = folder / "unofficial" / "steps.partial.json"
    assert len(json.loads(partial.read_text())["rows"]) == 3
    assert (folder / "steps.json").read_text() == "committed"
    assert capsys.readouterr().out == (
        f"interrupted; its 3 rows are in {partial}, and older results stay as they were\n"
    )
    with pytest.raises(ZeroDivisionError), Results("steps", CPU, None, []):
        raise ZeroDivisionError


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write(tmp_path / "a.json", "steps", CPU, {}, [])
    before = path.read_text()
    monkeypatch.setattr("pathlib.Path.replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write(path, "steps", CPU, {"more": 1}, [])
    assert path.read_text() == before


def test_options_that_were_given():
    args = argparse.Namespace(preset=None, new_tokens=3, quick=False, frames=[4])
    assert chosen(args, ("preset", "new_tokens", "quick", "frames")) == ["--new-tokens", "--frames"]


@pytest.mark.parametrize("name", ["throughput", "kernels", "projector", "steps", "swap", "fp8"])
def test_make_benchmark_and_make_gpu_choose_nothing(name):
    """Or their results would not be those that README shows."""
    parse = __import__(f"benchmarks.{name}", fromlist=["parse"]).parse
    assert parse(["--device", "cpu", "--time-limit", "9"]).chosen == []
    assert parse(["--device", "cpu", "--quick"]).chosen == ["--quick"]


def test_make_benchmark_runs_the_others_after_one_failed(tmp_path):
    """And Ctrl-C stops all of them. With a Python that does nothing but that."""
    (tmp_path / "bin").mkdir()
    python, log = tmp_path / "bin" / "python", tmp_path / "log"

    def make(code):
        log.write_text("")
        python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$*" in *kernels*) exit {code};; esac\n')
        python.chmod(0o755)
        (tmp_path / "ready").touch()
        command = ["make", "benchmark", f"VENV={tmp_path}", "OUT=here"]
        done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, timeout=60)
        return done.returncode, [line.split()[1].removeprefix("benchmarks.") for line in log.read_text().splitlines()]

    every = ["throughput", "kernels", "projector", "steps", "swap", "fp8", "table"]
    assert make(0) == (0, every)
    assert make(1) == (2, every)  # of make, which names the exit code of the command
    assert make(130) == (2, every[:2])


# ---- doubts


def doubts(where=CPU, percent=None, **changes):
    class Some(Outcome):
        samples = changes.pop("samples", 2)

        def percent_of_bound(self):
            return percent

    row = Some(**changes)
    row.judge(where)
    return row.doubts, row.unsteady(where)


def test_what_is_doubted():
    assert doubts() == ({}, False)
    assert doubts(samples=1) == ({"samples": "one sample"}, True)
    assert doubts(load=Load(10.0, 1.9)) == ({}, False)
    assert doubts(load=Load(10.0, 1.5, 1.5)) == ({"load": "others used 0.3 of the 2 cores"}, True)
    assert doubts(load=Load(0.05, 0.04)) == ({}, False)  # as much as the kernel's clock is wrong
    assert doubts(percent=70.0) == doubts(percent=130.0) == ({}, False)
    assert doubts(percent=318.0) == ({"bound": "318 % of its bound"}, True)
    assert doubts(percent=38.0) == ({"bound": "38 % of its bound"}, True)
    assert doubts(status="failed", reason="no", samples=1) == ({}, False)


def test_a_gpu_needs_few_cores_and_is_far_from_its_bound_on_small_inputs():
    assert doubts(GPU, load=Load(10.0, 100.0)) == ({}, False)
    assert doubts(GPU, load=Load(10.0, 150.0)) == ({"load": "others used 15.0 of the 16 cores"}, True)
    assert doubts(GPU, percent=50.0) == ({"bound": "50 % of its bound"}, False)
    assert doubts(GPU, percent=140.0) == ({"bound": "140 % of its bound"}, True)


def test_what_does_not_fit_is_no_failure(capsys):
    rows = made(4)
    rows[0].fail("out of memory")
    rows[1].fail("too late", "left out")
    assert [row.status for row in rows] == ["does not fit", "left out", "ok", "ok"]
    assert report.finish(rows, [], ["the last line"]) == 0
    assert capsys.readouterr().out == "the last line\n"
    rows[2].fail("ValueError: [no] such layer")
    rows[3].doubts = {"samples": "one sample"}
    assert report.finish(rows, [], []) == 1
    assert capsys.readouterr().out == "? 3: one sample\nFAILED: 2: ValueError: [no] such layer\n"
    rows = made(60)
    for row in rows[:50]:
        row.doubts = {"load": "others used 1.0 of the 2 cores"}
    assert report.finish(rows, [], []) == 0
    assert capsys.readouterr().out == "? 0 and 49 more of 60 rows: others used 1.0 of the 2 cores\n"


def test_a_benchmark_starts_without_the_noise_of_others():
    for name in ("torchao", "torch.utils._pytree"):
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
    assert results.INTERRUPTED == 130
