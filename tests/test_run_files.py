"""`ppllava run`: what is wrong with its files, the requests and the answers, is one sentence, and costs no answer."""

import errno
import json
import os
import resource
import shutil
import stat
from pathlib import Path

import pytest
from cli_fixtures import call, failed_run, files, run

from ppllava import running

# The file of requests


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read (No such file or directory); pass a file of JSON lines"),
        (b"", "has no requests, it is empty; write one JSON object a line: id, prompt and video"),
        (b"\n \r\n", "has no requests, it is empty; write one JSON object a line: id, prompt and video"),
        (
            b"\x89PNG\r\n\x1a\n\0\0",
            "has no requests, line 1: must be one JSON object, and is none ('utf-8' codec can't decode byte 0x89 in "
            "position 0: invalid start byte); write one JSON object a line: id, prompt and video",
        ),
        (
            b'[\n  {"id": 1,\n   "prompt": "?"\n  }\n]\n',
            "has no requests, line 1: must be one JSON object, and is none (Expecting value at column 2); write one "
            "JSON object a line: id, prompt and video",
        ),
    ],
)
def test_no_requests(run, tmp_path, content, text):
    path = tmp_path / "given.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert failed_run(run(path)[1]) == (2, f"{path}: {text}")
    assert not list(tmp_path.glob("answers*"))


def test_a_folder_of_requests(run, tmp_path):
    text = f"{tmp_path}: cannot be read (Is a directory); pass a file of JSON lines"
    assert failed_run(run(tmp_path)[1]) == (2, text)


# The file of answers


def test_other_settings(run, tmp_path):
    run([{}])
    out = tmp_path / "answers.jsonl"
    before = out.read_bytes()
    code, text = failed_run(run([{}], "--tokens", 3, "--memory", 1)[1])
    assert (code, text) == (
        2,
        f"-o: {out} holds answers with other settings (tokens None); pass these, delete it, or choose another file",
    )
    assert out.read_bytes() == before
    assert run([{}], "--memory", 1, "--threads", 2)[1].exit_code == 0


@pytest.mark.parametrize(
    "content",
    [b"precious", b'{"a": 1}\n', b'{"id": 1, "answer": 2}\n', b"\x00\xff", b'{"id": 1, "answer": "?"}\n', b"[]"],
)
def test_a_file_that_is_none_of_answers(run, tmp_path, content):
    out = tmp_path / "answers.jsonl"
    out.write_bytes(content)
    code, text = failed_run(run([{}])[1])
    assert code == 2
    assert text.startswith("-o: ")
    assert text.endswith("choose another file")
    assert out.read_bytes() == content
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.jsonl"]


def test_a_damaged_line(run, tmp_path):
    run([{}, {"image": "i.png"}, {"image": "j.jpg"}])
    out = tmp_path / "answers.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    before = out.read_bytes()
    text = f"-o: line 2 of {out} is no answer; delete it, or choose another file"
    assert failed_run(run([{}])[1]) == (2, text)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"[]", b"\xff", b'{"settings": [], "requests": {}}', b'{"settings": {}}', b"[" * 100_000],
)
@pytest.mark.parametrize("answered", [True, False])
def test_a_foreign_job(run, tmp_path, content, answered):
    out, job = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.job"
    if answered:
        run([{}])
    before = out.read_bytes() if answered else None
    job.write_bytes(content)
    if not answered and not content:
        assert run([{}])[1].exit_code == 0
        return
    code, text = failed_run(run([{}])[1])
    assert (code, text) == (
        2,
        f"-o: answers.jsonl cannot be gone on with, as {job} does not tell what it answers; delete both, or choose "
        "another file",
    )
    assert (out.read_bytes() if answered else None) == before
    assert (job.read_bytes() if content else b"") == content


def test_answers_to_other_requests(run, tmp_path):
    run([{"id": 1}, {"id": 2}])
    before = (tmp_path / "answers.jsonl").read_bytes()
    code, text = failed_run(run([{"id": "1"}, {"id": 3}])[1])
    assert (code, text) == (
        2,
        f"-o: {tmp_path / 'answers.jsonl'} holds answers to other requests, of these it has none; delete it, or choose "
        "another file",
    )
    assert (tmp_path / "answers.jsonl").read_bytes() == before


def test_two_jobs_at_once(run, tmp_path, monkeypatch):
    engine, results = running.local_engine, []

    def while_it_runs(*arguments):
        monkeypatch.setattr(running, "local_engine", engine)
        for outcome in engine(*arguments):
            yield outcome
            results.append(run([{}])[1])

    monkeypatch.setattr(running, "local_engine", while_it_runs)
    answers, first = run([{}])
    assert (first.exit_code, [*answers[0]]) == (0, ["id", "answer"])
    [second] = results
    out = tmp_path / "answers.jsonl"
    text = f"-o: another `ppllava run` writes {out}; wait, or choose another file"
    assert failed_run(second) == (2, text)
    assert run([{}])[1].exit_code == 0


@pytest.mark.parametrize(
    ("requests", "out"), [("x", "x"), ("x.job", "x"), ("x.new", "x"), ("x.job.new", "x"), ("x", "l")]
)
def test_the_requests_are_never_written(run, tmp_path, requests, out):
    path, out = tmp_path / requests, tmp_path / out
    content = json.dumps({"id": 1, "video": "a.mp4", "prompt": "?"}).encode()
    path.write_bytes(content)
    if out.name == "l":
        out.symlink_to(path)
    code, text = failed_run(run(path, out=out)[1])
    assert code == 2
    assert text.endswith(f"would write over the requests in {path}; choose another file")
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", ["folder", "pipe", "none/answers.jsonl", "a.mp4/answers.jsonl", "a" * 300])
def test_places_that_cannot_be_written(run, files, tmp_path, place):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    shutil.copy(files / "a.mp4", tmp_path)
    out = tmp_path / place
    code, text = failed_run(run([{}], out=out)[1])
    reasons = {
        "folder": (2, f"-o must be a file, got {out}, which is a folder or a device; add a name"),
        "pipe": (2, f"-o must be a file, got {out}, which is a folder or a device; add a name"),
        "none/answers.jsonl": (7, f"{out} cannot be written (No such file or directory); free some space, or"),
        "a.mp4/answers.jsonl": (7, f"{out} cannot be written (Not a directory); free some space, or write elsewhere"),
    }
    expected = reasons.get(place, (7, f"{out} cannot be written (File name too long); free some space, or"))
    assert code == expected[0]
    assert text.startswith(expected[1])
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_that_is_read_only(run, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        folder = Path("/proc/self")  # for root, who may write everywhere else
    code, text = failed_run(run([{}], out=folder / "answers.jsonl")[1])
    assert code == 7
    assert text.startswith(f"{folder / 'answers.jsonl'} cannot be written (")


def test_a_full_disk(run, tmp_path, monkeypatch):
    """No file may grow beyond a limit: the write that reaches it is a partial one, as on a full disk."""
    requests = [{"prompt": f"What is {n}?"} for n in range(20)]
    whole, _ = run(requests)
    content = (tmp_path / "answers.jsonl").read_bytes()
    out = tmp_path / "full.jsonl"
    engine, limits = running.local_engine, resource.getrlimit(resource.RLIMIT_FSIZE)

    def until_full(*arguments):
        for n, outcome in enumerate(engine(*arguments)):
            if n == 8:
                size = out.stat().st_size + 10
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            yield outcome

    monkeypatch.setattr(running, "local_engine", until_full)
    try:
        _, result = run(requests, out=out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = os.strerror(errno.EFBIG)
    assert failed_run(result) == (7, f"{out} cannot be written ({reason}); free some space, or write elsewhere")
    assert out.read_bytes().count(b"\n") == 8
    monkeypatch.setattr(running, "local_engine", engine)
    assert run(requests, out=out)[0] == whole
    assert out.read_bytes() == content


def test_a_full_disk_at_the_start(run, tmp_path):
    """Settings that are shorter than a buffer reach the disk where their file is closed."""
    requests, limits = tmp_path / "given.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    requests.write_text('{"id": 1, "video": "a.mp4", "prompt": "What?"}')
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        _, result = run(requests)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out = tmp_path / "answers.jsonl"
    text = f"{out} cannot be written ({os.strerror(errno.EFBIG)}); free some space, or write elsewhere"
    assert failed_run(result) == (7, text)


# The file of answers, while others move it


@pytest.fixture
def meanwhile(run, tmp_path, monkeypatch):
    """Runs six requests, and `act` on the folder of the answers after two outcomes; the result, and how many outcomes
    there were."""
    engine, outcomes = running.local_engine, []

    def answer(act):
        def disturbed(*arguments):
            for outcome in engine(*arguments):
                yield outcome
                outcomes.append(outcome)
                if len(outcomes) == 2:
                    act(tmp_path / "place")

        (tmp_path / "place").mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(running, "local_engine", disturbed)
            _, result = run(REQUESTS, out=tmp_path / "place" / "answers.jsonl")
        return result, len(outcomes)

    return answer


REQUESTS = [{"prompt": f"What is {n}?"} for n in range(6)]


def test_a_folder_that_is_removed_ends_the_job(meanwhile, tmp_path):
    result, count = meanwhile(shutil.rmtree)
    out = tmp_path / "place" / "answers.jsonl"
    text = f"{out} is gone with its folder, and with it 2 outcomes; make the folder again, and run the command again"
    assert failed_run(result) == (7, text)
    assert count == 2
    assert not out.parent.exists()


def test_files_that_are_removed_are_written_again(meanwhile, run, tmp_path):
    def remove(folder):
        for path in folder.iterdir():
            path.unlink()

    result, count = meanwhile(remove)
    out = tmp_path / "place" / "answers.jsonl"
    assert (result.exit_code, count) == (0, 6)
    whole = out.read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["answers.jsonl", "answers.jsonl.job"]
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    answers, again = run(REQUESTS, out=out)
    assert again.stderr.startswith("ppllava: 2 of 6 answers are in ")
    assert (len(answers), out.read_bytes()) == (6, whole)


def test_another_file_of_the_name_is_left_alone(meanwhile, tmp_path):
    def replace(folder):
        (folder / "other").write_text("precious")
        (folder / "other").replace(folder / "answers.jsonl")

    result, count = meanwhile(replace)
    out = tmp_path / "place" / "answers.jsonl"
    text = (
        f"{out} is another file than the one with the answers so far, something has replaced it; move it away, and run "
        "the command again"
    )
    assert (failed_run(result), count, out.read_text()) == ((7, text), 2, "precious")


def test_files_reach_the_disk_before_their_names(run, tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def replaced(source, target):
        calls.append((os.path.getsize(source), os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    run([{}])
    named = [call[1] for call in calls if isinstance(call, tuple)]
    assert named == ["answers.jsonl", "answers.jsonl.job", "answers.jsonl"]
    for size, (moved, _), folder in zip(calls[::3], calls[1::3], calls[2::3], strict=True):
        assert (size, folder) == (moved, "folder")
