"""What other processes take of the cores: counted right, and a benchmark beside a busy one says so."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import baselines, kernels, load, report, timing

pytestmark = pytest.mark.skipif(load.read_ticks() is None, reason="needs /proc of Linux")
BURN = "import time\nwhile time.process_time() < {}: pass"  # so many seconds of a core


@contextlib.contextmanager
def busy_stranger():
    """A process that uses a core, for a minute of its time at most, and does not come from this one."""
    start = f"{sys.executable} -c '{BURN.format(60)}' > /dev/null 2>&1 & echo $!"
    process = int(subprocess.run(["sh", "-c", start], check=True, capture_output=True, text=True).stdout)
    try:
        yield process
    finally:
        os.kill(process, signal.SIGKILL)


def own_seconds():
    return load.read_ticks().own


def test_own_processes_are_not_others():
    before = own_seconds()
    subprocess.run([sys.executable, "-c", BURN.format(0.3)], check=True)  # has ended, and was waited for
    ended = own_seconds()
    assert ended - before > 0.2
    with subprocess.Popen([sys.executable, "-c", BURN.format(60)]) as child:
        try:
            for _ in range(600):  # of a busy machine
                if (running := own_seconds() - ended) > 0.2:
                    break
                time.sleep(0.05)
        finally:
            child.kill()
    assert running > 0.2


def test_a_stranger_is_another():
    found, before = load.Load(), load.read_ticks()
    with busy_stranger(), load.watch(found):
        time.sleep(1.0)
    own = own_seconds() - before.own
    assert own < 0.5
    assert found.wall_s >= 1.0
    assert found.others_s + found.steal_s > 0.4


def test_the_text_of_proc_stat():
    stat = "cpu  100 5 20 1000 50 3 2 1 7 0\ncpu0 50 2 10 500 25 1 1 8 0 0\ncpu1 50 3 10 500 25 2 1 4 7 0\nintr 12 3\n"
    rate = os.sysconf("SC_CLK_TCK")
    assert load.core_seconds(stat, {0}) == (64 / rate, 8 / rate)
    assert load.core_seconds(stat, {0, 1}) == (130 / rate, 12 / rate)


def test_a_tree_of_processes(tmp_path, monkeypatch):
    rate = os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(load, "PROC", tmp_path)
    for process, parent, ticks in (
        (7, 1, (1, 2, 3, 4)),
        (8, 7, (10, 0, 0, 0)),
        (9, 8, (0, 20, 0, 0)),
        (5, 1, (99,) * 4),
    ):
        (tmp_path / str(process)).mkdir()
        fields = ["R", parent, *[0] * 9, *ticks, 0, 0]
        (tmp_path / str(process) / "stat").write_text(f"{process} (a (b) c) {' '.join(map(str, fields))}\n")
    assert load.tree_seconds(7) == (1 + 2 + 3 + 4 + 10 + 20) / rate


def test_loads_add_up():
    whole = load.Load.total([load.Load(1.0, 0.5, 0.1), load.Load(3.0, 0.1, 0.1)])
    assert whole == load.Load(4.0, 0.6, 0.2)
    assert whole.disturbed({"type": "cpu", "cores": 2}) is None
    assert load.Load().disturbed({"type": "cpu", "cores": 2}) is None


def test_a_benchmark_beside_a_busy_process_is_marked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.machine.RESULTS", tmp_path)
    monkeypatch.setattr(baselines, "compiled", lambda function: function)
    monkeypatch.setattr(timing, "last_level_cache", lambda: 1 << 20)
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 1 << 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = ["--device", "cpu", "--no-isolation", "--budget", "0.5", "--shapes", "tiny_video", "--dtypes", "fp32"]
    try:
        with busy_stranger():
            code = kernels.main([*arguments, "--ops", "prompt_relevance", "--backends", "reference"])
    finally:
        torch.set_num_threads(threads)
    assert code == 0  # nothing failed
    [path] = tmp_path.glob("*/*/kernels.json")
    assert path.parent.name == "unofficial"
    for row in report.read(path, "kernels")["rows"]:
        assert row["load"]["others_s"] + row["load"]["steal_s"] > 0.2 * row["load"]["wall_s"] > 0
        assert "others used " in row["doubts"]["load"]
    out = capsys.readouterr().out
    assert "? prompt_relevance tiny_video fp32 forward reference and 7 more of 8 rows: others used " in out
    assert "?/" in out  # in the table
