"""`make regress`: it names an op that became slower, and passes sides that are alike, on a noisy machine, too."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import regress, regress_build
from benchmarks.regress import Answer, Item

ITEMS = [
    Item(op, "tiny_video", "fp32", direction, "cpp")
    for op in ("prompt_relevance", "weighted_pool3d")
    for direction in ("forward", "backward")
]
SLOW = ITEMS[3]


class FakeSide:
    """Takes a millisecond for each item, more by `factors`, with noise that hits neighbours in time alike."""

    def __init__(self, name, machine, factors=None, failed=None):
        self.name, self.machine, self.factors, self.failed = name, machine, factors or {}, failed or {}
        self.running, self.rounds, self.checked = False, [], set()

    def start(self):
        assert not self.running
        self.running = True
        self.rounds.append([])

    def time(self, item, check):
        assert self.running
        self.rounds[-1].append(item)
        if check:
            self.checked.add(item)
        if item in self.failed:
            return Answer(None, self.failed[item])
        return Answer(1e-3 * self.factors.get(item, 1.0) * self.machine())

    def stop(self):
        self.running = False


class FakeLoad:
    busy = 0.0

    def others(self):
        return self.busy


def noisy(seed=0):
    """Speed of a machine that drifts by a third and jitters by 2 %."""
    state = random.Random(seed)
    drift = 1.0

    def now():
        nonlocal drift
        drift = min(1.3, max(1.0, drift + state.uniform(-0.02, 0.02)))
        return drift * state.uniform(0.98, 1.02)

    return now


def judged(base, head, capsys, busy=0.0, limit=0.1):
    """(exit code, what was printed)."""
    load = type("Load", (FakeLoad,), {"busy": busy})
    results, loads = regress.compare(base, head, ITEMS, limit, load=load)
    code = regress.conclude(results, loads, limit)
    return code, capsys.readouterr().out


def test_an_op_that_is_30_percent_slower_is_named(capsys):
    machine = noisy()
    base, head = FakeSide("base", machine), FakeSide("head", machine, {SLOW: 1.3})
    code, said = judged(base, head, capsys)
    assert code == 1
    assert re.search(r"SLOWER: weighted_pool3d tiny_video fp32 backward cpp: 1\.(2[6-9]|3[0-4]) times the time", said)
    assert said.count("SLOWER") == 1
    assert base.checked == head.checked == set(ITEMS)  # once, by the gate
    repeated = head.rounds[regress.ROUNDS :]
    assert repeated == [[SLOW]] * regress.MORE  # what looks slower, and nothing else
    assert "others used" not in said.lower()


def test_sides_that_are_alike_pass(capsys):
    machine = noisy(1)
    code, said = judged(FakeSide("base", machine), FakeSide("head", machine, {SLOW: 0.7}), capsys)
    assert code == 0
    assert "No op takes over 10 % longer." in said
    assert "SLOWER" not in said


def test_one_slow_round_is_not_a_regression(capsys):
    machine = noisy(2)
    head = FakeSide("head", machine)
    time = head.time
    head.time = lambda item, check: Answer(time(item, check).seconds * (2 if len(head.rounds) == 1 else 1))
    code, said = judged(FakeSide("base", machine), head, capsys)
    assert code == 0, said


def test_rounds_that_disagree_are_no_verdict(capsys):
    head = FakeSide("head", lambda: 1.0)
    time = head.time
    head.time = lambda item, check: Answer(time(item, check).seconds * (0.9 if len(head.rounds) % 4 == 1 else 1.2))
    code, said = judged(FakeSide("base", lambda: 1.0), head, capsys)
    assert code == 2
    assert "UNCLEAR: weighted_pool3d" in said
    assert "run again on an idle machine" in said


def test_a_wrong_result_fails_and_gets_no_time(capsys):
    wrong = {SLOW: "wrong, error 1.0e+00 is not <= 1.0e-06"}
    code, said = judged(FakeSide("base", lambda: 1.0), FakeSide("head", lambda: 1.0, failed=wrong), capsys)
    assert code == 1
    assert "WRONG: weighted_pool3d tiny_video fp32 backward cpp: head: wrong, error" in said


def test_what_the_base_has_not_is_not_compared(capsys):
    missing = {SLOW: "cpp cannot run there"}
    code, said = judged(FakeSide("base", lambda: 1.0, failed=missing), FakeSide("head", lambda: 1.0), capsys)
    assert code == 0
    assert "not compared: weighted_pool3d tiny_video fp32 backward cpp: base: cpp cannot run there" in said


def test_a_disturbed_machine_is_told(capsys):
    code, said = judged(FakeSide("base", lambda: 1.0), FakeSide("head", lambda: 1.0), capsys, busy=0.7)
    assert code == 0
    assert "round 1: 4 items, others used 0.7 cores" in said
    assert "the machine was disturbed" in said


def test_load_counts_others_and_not_this_process():
    watch = regress.Load()
    sum(range(3_000_000))
    before = watch.start
    # A second earlier, in which half a core worked for others.
    watch.start = before._replace(now=before.now - 1.0, busy=before.busy - 0.5)
    assert 0.2 <= watch.others() < 10
    assert regress.Load().others() is not None


def test_two_processes_time_the_ops_of_a_folder(monkeypatch, tmp_path):
    """The whole protocol, on this checkout's own package: imports from the folder, checks, times, ends."""
    package = Path(regress_build.ROOT) / "ppllava_kernels"
    shutil.copytree(package, tmp_path / "ppllava_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    side = regress_build.ProcessSide("here", tmp_path, "cpu")
    item = Item("weighted_pool3d", "tiny_image", "fp32", "forward", "reference")
    side.start()
    try:
        assert "reference" in side.greet()["weighted_pool3d"]
        assert side.time(item, check=True).seconds > 0
        assert side.time(item._replace(backend="cuda"), check=False).failed == "cuda cannot run there"
        side.process.kill()
        assert "ended with exit code" in side.time(item, check=False).failed
    finally:
        side.stop()
    assert side.process is None


def test_sides_are_files_of_a_commit_and_of_the_checkout(monkeypatch, tmp_path):
    """Files come from git, and what was deleted goes; nothing is compiled twice for the same sources."""
    root, folder = tmp_path / "repository", tmp_path / "sides"
    (root / "csrc").mkdir(parents=True)
    (root / "ppllava_kernels").mkdir()
    (root / "benchmarks").mkdir()
    (root / "setup.py").write_text(
        "import pathlib, sys\n"
        "assert sys.argv[1:] == ['build_ext', '--inplace']\n"
        "pathlib.Path('ppllava_kernels/_C.test.so').write_bytes(pathlib.Path('csrc/a.cpp').read_bytes())\n"
        f"open({str(tmp_path / 'builds')!r}, 'a').write('built\\n')\n"
    )
    for name, text in (("csrc/a.cpp", "one"), ("ppllava_kernels/old.py", ""), ("benchmarks/x.py", "")):
        (root / name).write_text(text)
    monkeypatch.setattr(regress_build, "ROOT", root)
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *command], cwd=root, check=True)

    base = regress_build.side("HEAD", "cpu", folder)
    head = regress_build.side(None, "cpu", folder)
    assert (tmp_path / "builds").read_text().count("built") == 1
    assert (head.folder / "ppllava_kernels" / "_C.test.so").read_text() == "one"
    assert not (base.folder / "benchmarks").exists()

    (root / "csrc" / "a.cpp").write_text("two, longer")
    (root / "ppllava_kernels" / "old.py").unlink()
    head = regress_build.side(None, "cpu", folder)
    assert (head.folder / "ppllava_kernels" / "_C.test.so").read_text() == "two, longer"
    assert (base.folder / "ppllava_kernels" / "_C.test.so").read_text() == "one"
    assert not (head.folder / "ppllava_kernels" / "old.py").exists()
    assert (base.folder / "ppllava_kernels" / "old.py").exists()
    with pytest.raises(ValueError, match=r"must be commits of this repository"):
        regress_build.side("no-such-branch", "cpu", folder)
    (root / "setup.py").write_text("raise SystemExit('no compiler')")
    with pytest.raises(ValueError, match="the kernels of this checkout cannot be built: no compiler"):
        regress_build.side(None, "cpu", folder)
