"""The GPU round, with steps that need no GPU: what fails, hangs or is stopped costs one step and is written down."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed
from benchmarks import gpu_round, rounds
from benchmarks.rounds import Step

MACHINE = {"device": "NVIDIA Test", "type": "cuda"}
# Starts a process of its own that writes its id, and then both sleep.
FAMILY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""


def python(name, code, limit_s=30.0, **options):
    return Step(name, (sys.executable, "-c", code), limit_s, **options)


def execute(path, *plan, time_limit=60, resume=False):
    """(exit code, records by name) of a round."""
    code = gpu_round.execute(plan, path, MACHINE, time_limit, resume)
    result = json.loads(path.read_text())
    assert result["kind"] == "gpu_round"
    assert result["machine"] == MACHINE
    return code, {row["name"]: row for row in result["rows"]}


@pytest.fixture
def path(tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "results" / "gpu_round.json"
    signal.signal(signal.SIGTERM, handler)


def gone(process_id):
    """Whether it ended; a zombie did, too."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_later_steps_run_after_a_failed_one(path, capsys):
    code, rows = execute(
        path,
        python("good", "print('fine')"),
        python("bad", "print('x' * 9000); print('the reason'); raise SystemExit(3)"),
        Step("absent", ("no-such-program",), 5, why_not="no-such-program is not on the PATH"),
        python("last", "print('here')"),
    )
    assert code == 1
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "passed",
        "bad": "failed",
        "absent": "skipped",
        "last": "passed",
    }
    assert rows["good"]["tail"] == "fine\n"
    assert rows["bad"]["reason"] == "exit code 3"
    assert rows["bad"]["tail"].endswith("x\nthe reason\n")
    assert len(rows["bad"]["tail"]) == rounds.TAIL
    assert rows["absent"]["reason"] == "no-such-program is not on the PATH"
    printed = capsys.readouterr().out
    assert "bad: failed, 0 s, exit code 3" in printed
    assert "the reason" in printed


def test_a_program_that_cannot_start_is_a_failed_step(path):
    code, rows = execute(path, Step("absent", ("no-such-program",), 5), python("last", "print('here')"))
    assert code == 1
    assert rows["absent"]["status"] == "failed"
    assert "no-such-program" in rows["absent"]["reason"]
    assert rows["last"]["status"] == "passed"


def test_all_passed_or_skipped_is_success(path):
    assert execute(path, python("good", ""), python("tool", "", why_not="not installed"))[0] == 0


def test_a_step_that_hangs_is_killed_with_its_children(path):
    code, rows = execute(path, python("hangs", FAMILY, limit_s=1.5), python("last", ""))
    assert code == 1
    assert rows["hangs"]["status"] == "timed out"
    assert 1.5 <= rows["hangs"]["seconds"] < 20
    assert gone(int(re.search(r"child (\d+)", rows["hangs"]["tail"])[1]))
    assert rows["last"]["status"] == "passed"


def test_children_do_not_outlive_a_step_that_passed(path):
    rows = execute(path, python("leaves", FAMILY.replace("time.sleep(60)\n", "", 1)[: FAMILY.rindex("time.sleep")]))[1]
    assert rows["leaves"]["status"] == "passed"
    assert gone(int(re.search(r"child (\d+)", rows["leaves"]["tail"])[1]))


def test_a_tool_that_refuses_the_device_is_skipped_with_its_words(path):
    refuses = "print('Error: Device not supported. See the release notes'); raise SystemExit(86)"
    plan = (python("memcheck", refuses, refusal=r"Device not supported.*"), python("other", refuses))
    code, rows = execute(path, *plan)
    assert code == 1
    assert (rows["memcheck"]["status"], rows["other"]["status"]) == ("skipped", "failed")
    assert rows["memcheck"]["reason"] == "Device not supported. See the release notes"


def test_what_does_not_fit_is_left_out_and_later_steps_keep_their_least(path):
    hangs = "import time; time.sleep(60)"
    plan = (python("hangs", hangs), python("large", "", least_s=50), python("small", "", least_s=1))
    code, rows = execute(path, *plan, time_limit=5)
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["left out", "left out", "passed"]
    assert re.fullmatch(r"\d s were left, it needs 50", rows["large"]["reason"])
    _, rows = execute(path, python("hangs", hangs, least_s=0.1), python("later", "", least_s=4), time_limit=7)
    assert rows["hangs"]["status"] == "timed out"
    assert rows["hangs"]["seconds"] < 3
    assert rows["later"]["status"] == "passed"


def test_benchmarks_know_when_to_start_nothing_more(path):
    step = Step("kernels", (sys.executable, "-c", "import sys; print(sys.argv[1:])", "--time-limit", "{limit}"), 100)
    rows = execute(path, step, time_limit=500)[1]
    assert rows["kernels"]["tail"] == f"['--time-limit', '{100 - rounds.MARGIN_S}']\n"


def test_resume_runs_what_did_not_pass(path, tmp_path, monkeypatch):
    flag, log = tmp_path / "flag", tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write(NAME + ' ')"
    plan = (
        python("build", f"NAME = 'build'; {note}", always=True),
        python("good", f"NAME = 'good'; {note}"),
        python("bad", f"NAME = 'bad'; {note}; import os; raise SystemExit(not os.path.exists({str(flag)!r}))"),
    )
    assert execute(path, *plan)[0] == 1
    flag.touch()
    code, rows = execute(path, *plan, resume=True)
    assert code == 0
    assert log.read_text().split() == ["build", "good", "bad", "build", "bad"]
    assert [row["resumed"] for row in rows.values()] == [False, True, False]
    monkeypatch.setattr(gpu_round, "fingerprint", lambda: "other sources")
    assert execute(path, *plan, resume=True)[0] == 0
    assert log.read_text().split()[5:] == ["build", "good", "bad"]


def test_the_fingerprint_follows_the_sources(tmp_path, monkeypatch):
    for name in ("setup.py", "pyproject.toml", "csrc/cuda/pool.cu", "benchmarks/results/x/kernels.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(gpu_round, "ROOT", tmp_path)
    before = gpu_round.fingerprint()
    (tmp_path / "benchmarks/results/x/kernels.json").write_text("2")
    assert gpu_round.fingerprint() == before
    (tmp_path / "csrc/cuda/pool.cu").write_text("2")
    assert gpu_round.fingerprint() != before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_round_that_is_stopped_writes_what_it_has(number, path):
    code = f"""
import sys
from pathlib import Path
from benchmarks import gpu_round
from benchmarks.rounds import Step
family = Step("family", (sys.executable, "-c", {FAMILY!r}), 50)
plan = (Step("good", (sys.executable, "-c", "print(1)"), 50), family, Step("last", ("true",), 50))
sys.exit(gpu_round.execute(plan, Path({str(path)!r}), {MACHINE!r}, 100, False))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=rounds.ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("family"):
            break
    time.sleep(1)  # it starts its child
    os.kill(process.pid, number)
    process.communicate(timeout=30)
    assert process.returncode == 1
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "passed",
        "family": "interrupted",
        "last": "left out",
    }
    assert rows["last"]["reason"] == "the round was interrupted"
    assert gone(int(re.search(r"child (\d+)", rows["family"]["tail"])[1]))


def test_the_steps_fit_and_name_what_is_missing(monkeypatch, tmp_path):
    plan = {step.name: step for step in gpu_round.steps(tmp_path)}
    checks = ["build", "backends", "tests", "memcheck", "racecheck"]
    benchmarks = ["kernels", "projector", "throughput", "steps", "swap", "fp8"]
    assert list(plan) == [*checks, *benchmarks, "tables"]
    assert sum(step.least_s for step in plan.values()) < 570
    files = [word for word in plan["tests"].command if word.startswith("tests/")]
    assert {"tests/test_weighted_pool3d.py", "tests/test_prompt_guided_pool3d.py"} <= {*files}
    assert "tests/test_model.py" not in files
    assert str(tmp_path) in plan["kernels"].command
    assert str(tmp_path) in plan["projector"].command
    assert "--out" not in {step.name: step for step in gpu_round.steps(None)}["kernels"].command
    monkeypatch.setattr(gpu_round.importlib.util, "find_spec", lambda name: None if name in ("pytest", "av") else 1)
    monkeypatch.setattr(gpu_round.shutil, "which", lambda name: None)
    plan = {step.name: step for step in gpu_round.steps(None)}
    assert plan["tests"].why_not == plan["memcheck"].why_not == "the Python package pytest is not installed"
    assert plan["throughput"].why_not == plan["steps"].why_not == "the Python package av is not installed"
    assert plan["kernels"].why_not is None
    assert "tests/swap/test_swap_objects.py" not in plan["tests"].command
    monkeypatch.setattr(gpu_round.importlib.util, "find_spec", lambda name: 1)
    assert "tests/swap/test_swap_objects.py" in {step.name: step for step in gpu_round.steps(None)}["tests"].command
    monkeypatch.setattr(gpu_round, "version", lambda name: "5.17.0")
    plan = {step.name: step for step in gpu_round.steps(None)}
    assert plan["racecheck"].why_not == "compute-sanitizer is not on the PATH"
    assert plan["throughput"].why_not == "transformers 5.20 or newer is needed, 5.17.0 is installed"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu_round.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_round.main([])
    assert "needs a CUDA GPU" in capsys.readouterr().err
