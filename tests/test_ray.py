"""`ppllava run --engine ray` on a cluster of two workers on this machine."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import clips
import pytest
from cli_fixtures import QUESTION, call, files, run
from typer.testing import CliRunner

from ppllava import cli, ray_engine, running
from ppllava.packing import Outcome
from ppllava.request import Request

ray = pytest.importorskip("ray", reason="needs Ray; pip install 'ray[data]' runs these tests")
pytest.importorskip("ray.data", reason="needs Ray Data; pip install 'ray[data]' runs these tests")

# Each worker imports torch and transformers, while another worker of pytest-xdist compiles on the other core.
pytestmark = pytest.mark.timeout(600)
RAY = ("--engine", "ray", "--workers", "2")
ONE = ("--engine", "ray", "--workers", "1")  # each worker is a process that imports torch and transformers
OPTIONS = ("--preset", "tiny", "--max-new-tokens", "8")
KILLED = """
import os, signal, sys
from ppllava import cli
from ppllava.running import AnswerFile

add = AnswerFile.add
count, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))

def until(*arguments):
    global count
    add(*arguments)
    count -= 1
    if not count:
        if number == signal.SIGINT:
            os.killpg(0, number)  # as a terminal does
        else:
            os.kill(os.getpid(), number)

AnswerFile.add = until
cli.main()
"""


@pytest.fixture(scope="module")
def cluster():
    """One for all jobs of this process."""
    ray_engine.start(ray, 2)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A file of 20 requests about 10 clips, of which no. 2, 5 and 8 are broken, and one line that is no request."""
    folder = tmp_path_factory.mktemp("job")
    lines = []
    for i in range(20):
        clip = folder / f"{i // 2}.mp4"
        if i % 2 == 0:
            clips.encode(clip, 4 + i % 5 * 4, size=(64, 48) if i % 4 else (48, 64))
        asked = {"video": str(clip), "prompt": "What " + "is " * (i % 7) + "it?", "frames": 2 + i // 2 % 3}
        lines.append(json.dumps({"id": f"clip {i}", **asked}))
    (folder / "2.mp4").write_text("not a video")
    clips.cut(folder / "5.mp4", 0.4).replace(folder / "5.mp4")
    (folder / "8.mp4").unlink()
    lines.insert(3, '{"id": ')
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def whole(job):
    """What the file of answers holds after one run in this process."""
    path = job.with_name("whole.jsonl")
    result = CliRunner().invoke(cli.app, ["run", str(job), "-o", str(path), *OPTIONS])
    answers = path.read_bytes()
    assert (result.exit_code, len(answers.splitlines())) == (3, 21)
    return answers


def test_the_answers_are_those_of_the_local_engine(cluster, run, job, whole, tmp_path):
    out = tmp_path / "answers.jsonl"
    answers, result = run(job, *RAY, out=out, options=OPTIONS)
    assert result.exit_code == 3
    assert out.read_bytes() == whole
    assert sum("error" in answer for answer in answers) == 7
    lines = result.stderr.splitlines()
    assert all(line.startswith("ppllava: ") for line in lines)
    assert lines[-1] == f"ppllava: 14 answers and 7 errors in {out}"
    assert "ppllava: line 4: must be one JSON object, and is none (Expecting value at column 7)" in lines
    assert ray.is_initialized()  # the cluster of somebody else


# Signals


def processes(mark):
    """Those that inherited it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(pids):
    """Until they have ended."""
    for pid in pids:
        try:
            end = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        assert select.select([end], [], [], 60)[0], Path(f"/proc/{pid}/cmdline").read_bytes()
        os.close(end)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs /proc and pidfd_open; run on Linux")
def test_killed_and_interrupted(cluster, run, job, whole, tmp_path):
    out = tmp_path / "answers.jsonl"
    for count, number, code, workers in (
        (3, signal.SIGKILL, -signal.SIGKILL, ("--workers", "1")),
        (4, signal.SIGINT, 130, ()),
    ):
        mark = f"PPLLAVA_TEST={uuid.uuid4()}"
        env = {**os.environ, **dict([mark.split("=")])}
        command = [sys.executable, "-c", KILLED, str(count), str(int(number)), "run", str(job), "-o", str(out)]
        result = subprocess.run(
            [*command, *OPTIONS, "--engine", "ray", *workers],
            capture_output=True,
            text=True,
            timeout=290,
            env=env,
            start_new_session=True,
        )
        assert result.returncode == code, result.stderr
        assert 0 < len(out.read_bytes().splitlines()) < 21
        assert not re.search("raylet|core_worker|authentication|ray.data|Dataset", result.stderr), result.stderr
        if number == signal.SIGKILL:  # Ray ends by itself then, too, but its agents take a minute
            for pid in processes(mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_for(processes(mark))
        assert processes(mark) == []
    text = rf"interrupted; \d+ of 21 requests are done, their answers in {re.escape(str(out))}; the same command goes"
    assert re.search(text, result.stderr.splitlines()[-1])
    _, result = run(job, *ONE, out=out, options=OPTIONS)
    assert "answers are in" in result.stderr
    assert out.read_bytes() == whole


# Workers that fail


def test_a_worker_that_dies_costs_its_group_only(cluster, run, monkeypatch):
    class Mortal(ray_engine.Worker):
        def __call__(self, row):
            if "Die" in row["requests"]:
                os._exit(1)
            return super().__call__(row)

    monkeypatch.setattr(ray_engine, "Worker", Mortal)
    requests = [
        {"image": "i.png", "prompt": f"What is {n}?"} if n % 2 else {"prompt": f"What is {n}?"} for n in range(4)
    ]
    requests += [{"video": "b.mp4", "prompt": "Die?"}, {"image": "j.jpg"}]
    answers, result = run(requests, *ONE)
    assert result.exit_code == 3
    errors = {answer["id"]: answer["error"] for answer in answers if "error" in answer}
    assert errors == {"r4": "was lost with the worker that had it; run the command again"}


def test_workers_without_a_model(cluster, run, tmp_path):
    _, result = run([{}], *ONE, options=("--model", tmp_path / "none"))
    text = (
        f"--model must be a folder that `save_pretrained` or `ppllava convert` wrote, got '{tmp_path / 'none'}', which"
    )
    assert result.exit_code == 4
    assert result.stderr.splitlines()[-1].startswith(f"ppllava: {text}")


def test_more_workers_than_the_cluster_has(cluster, run):
    _, result = run([{}], "--engine", "ray", "--workers", "7")
    text = "--workers 7 needs 7 CPUs in the Ray cluster, which has 3; pass fewer, or add nodes"
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"ppllava: {text}")


def test_no_cluster_at_the_address(run, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    _, result = run([{}], *RAY)
    text = "no Ray cluster answers at RAY_ADDRESS '127.0.0.1:1' ([Errno 111] Connection refused); start one there, or"
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"ppllava: {text}")


# In the worker


def test_groups():
    def request(n):
        return Request.of({"id": n, "video": f"{n // 2}.mp4", "prompt": "?", "fps": 1, "end": 2.5, "max_new_tokens": 3})

    requests = [request(n) for n in range(32)]
    rows = list(ray_engine.RayEngine(2)._groups(requests, {0, 1, 2, 3, 7}))
    places = [json.loads(row["places"]) for row in rows]
    assert places == [[n, n + 1, n + 2, n + 3] for n in range(4, 32, 4)]  # as without those that are done
    assert [json.loads(row["done"]) for row in rows] == [[7], *[[]] * 6]
    given = [Request.of(x) for row in rows for x in json.loads(row["requests"])]
    assert given == requests[4:]


def worker(job):
    made = ray_engine.Worker.__new__(ray_engine.Worker)
    made.job, made.failure = job, None
    return made


def row(requests, places, done=()):
    given = [{"id": n, "prompt": "?", "video": "a.mp4"} for n in range(requests)]
    return {"places": json.dumps(places), "done": json.dumps(list(done)), "requests": json.dumps(given)}


def test_a_group_that_fails_loses_no_request():
    class Job:
        def run(self, requests, done):
            assert done == {0}
            yield Outcome(2, requests[2].id, "yes")
            raise RuntimeError("a bug:\nof ours")

    kinds, values = zip(*(json.loads(given["json"]) for given in worker(Job())(row(4, [5, 6, 7, 9], [5]))))
    assert set(kinds) == {"outcome"}
    text = "the worker failed: a bug: of ours"
    assert [(value["index"], value["answer"], value["error"]) for value in values] == [
        (7, "yes", None),
        (6, None, text),
        (9, None, text),
    ]


def test_a_worker_whose_gpu_is_lost_ends(monkeypatch):
    class Job:
        def run(self, requests, done):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
            yield

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(ray_engine.os, "_exit", leave)
    with pytest.raises(SystemExit, match="70"):
        worker(Job())(row(2, [0, 1]))


def test_what_workers_warn_of_is_noted():
    class Job:
        def run(self, requests, done):
            import warnings

            from ppllava.video import VideoWarning

            warnings.warn("a.mp4: is cut short", VideoWarning, stacklevel=1)
            warnings.warn("something of a library", UserWarning, stacklevel=1)
            yield Outcome(0, 0, "yes")

    given = [json.loads(given["json"]) for given in worker(Job())(row(1, [0]))]
    assert [kind for kind, _ in given] == ["note", "outcome"]
    assert given[0][1] == "a.mp4: is cut short"


def spec(**changes):
    values = dict(model=None, preset="tiny", dtype=cli.Dtype.AUTO, frames=4, fps=None, tokens=None, max_new_tokens=4)
    return running.JobSpec(**{**values, "device": "cpu", **changes})


def test_a_worker_that_cannot_start_says_so(monkeypatch, tmp_path):
    code, text = ray_engine.Worker(spec(preset=None, model=str(tmp_path)), os.getcwd()).failure
    assert code == 4
    assert str(tmp_path) in text

    def fail(_):
        raise MemoryError("no\nroom")

    monkeypatch.setattr(running.JobSpec, "build", fail)
    made = ray_engine.Worker(spec(), "/none")
    assert made.failure == (6, "a worker of Ray cannot start (MemoryError: no room)")
    assert [json.loads(given["json"]) for given in made(row(1, [0]))] == [["failure", list(made.failure)]]
