"""`ppllava run`: answers, what is computed again after an interruption, and what its options do."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import clips
import pytest
import torch
from cli_fixtures import QUESTION, QUICK, answer_all, call, files, run

import ppllava
from ppllava import PPLlavaForConditionalGeneration, PPLlavaModel, console, presets, running

ROOT = Path(__file__).parent.parent
# Imports once, and then runs each job in a child, which gets a signal after so many outcomes.
KILLED = """
import json, os, sys
from ppllava import asking, cli, running

engine = running.local_engine

def until(count, number):
    def outcomes(*arguments):
        for n, outcome in enumerate(engine(*arguments), start=1):
            yield outcome
            if n == count:
                os.kill(os.getpid(), number)
    return outcomes

for line in sys.stdin:
    count, number, said, *arguments = json.loads(line)
    if not (child := os.fork()):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        running.local_engine = until(count, number)
        sys.argv[1:] = arguments
        cli.main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def rows(monkeypatch):
    """The number of prompts of each call of generate."""
    counts = []
    generate = PPLlavaForConditionalGeneration.generate

    def counted(model, input_ids, **kwargs):
        counts.append(len(input_ids))
        return generate(model, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", counted)
    return counts


# Fifty clips


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """A folder with requests.jsonl about 50 clips of many lengths, of which no. 7, 21 and 33 are broken."""
    folder = tmp_path_factory.mktemp("fifty")
    requests = []
    for i in range(50):
        clips.encode(folder / f"{i}.mp4", 4 + i % 5 * 4, size=(64, 48) if i % 2 else (48, 64))
        asked = {"video": f"{folder}/{i}.mp4", "prompt": "What " + "is " * (i % 7) + "it?", "frames": 2 + i % 3}
        requests.append({"id": f"clip {i}", **asked})
    (folder / "7.mp4").write_text("not a video")
    clips.cut(folder / "21.mp4", 0.4).replace(folder / "21.mp4")
    (folder / "33.mp4").unlink()
    (folder / "requests.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    return folder


FIFTY = ("--preset", "tiny", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def once(fifty):
    """The file of answers of one run."""
    path = fifty / "whole.jsonl"
    answers, result = answer_all(fifty, fifty / "requests.jsonl", path, *FIFTY)
    assert (result.exit_code, len(answers)) == (3, 50)
    return path


@pytest.fixture
def whole(once, tmp_path):
    """What it holds. A copy of it, and of what lies beside it, is in the folder of the test."""
    for path in (once, once.with_name("whole.jsonl.job")):
        shutil.copy(path, tmp_path)
    return once.read_bytes()


def test_fifty_clips_with_three_broken(whole, fifty):
    answers = list(map(json.loads, whole.splitlines()))
    assert [answer["id"] for answer in answers] == [f"clip {i}" for i in range(50)]
    errors = {i: answer.pop("error") for i, answer in enumerate(answers) if "error" in answer}
    assert {i: text.partition(": ")[0] for i, text in errors.items()} == {i: f"{fifty}/{i}.mp4" for i in (7, 21, 33)}
    assert "finds no video in it" in errors[7]
    assert "finds no video in it" in errors[21]
    assert "there is no such file" in errors[33]
    assert sum("answer" in answer for answer in answers) == 47


@pytest.fixture(scope="module")
def interrupted(fifty):
    """name -> the parts of a job that signals cut: (exit code, stderr, what the file of answers holds) of each, and the
    file, as the last one left it."""
    cuts = {"killed": [(11, signal.SIGKILL), (16, signal.SIGKILL)], "stopped": [(9, signal.SIGINT)]}
    command, pipe = [sys.executable, "-c", KILLED], subprocess.PIPE
    kept = {}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as driver:
        for name, signals in cuts.items():
            out, said = fifty / f"{name}.jsonl", fifty / f"{name}.txt"
            parts = []
            for count, number in signals:
                job = ["run", str(fifty / "requests.jsonl"), "-o", str(out), *FIFTY]
                print(json.dumps([count, int(number), str(said), *job]), file=driver.stdin, flush=True)
                parts.append((int(driver.stdout.readline()), said.read_text(), out.read_bytes()))
            kept[name] = parts, out
    return kept


def test_killed_twice(run, fifty, whole, interrupted):
    parts, out = interrupted["killed"]
    for code, _, left in parts:
        assert code == -signal.SIGKILL
        assert 0 < left.count(b"\n") < 50
        assert left != whole
    _, result = run(fifty / "requests.jsonl", out=out, options=FIFTY)
    assert result.exit_code == 3
    assert result.stderr.splitlines()[-1] == f"ppllava: 47 answers and 3 errors in {out}"
    assert out.read_bytes() == whole
    assert sorted(path.name for path in fifty.glob("killed.*")) == ["killed.jsonl", "killed.jsonl.job", "killed.txt"]


def test_interrupted(run, fifty, whole, interrupted):
    [(code, said, left)], out = interrupted["stopped"]
    assert (code, left.count(b"\n")) == (130, 9)
    text = f"interrupted; 9 of 50 requests are done, their answers in {out}; the same command goes on from there"
    assert said.splitlines()[-1] == f"ppllava: {text}"
    _, result = run(fifty / "requests.jsonl", out=out, options=FIFTY)
    assert f"of 50 answers are in {out}; going on with the others" in result.stderr
    assert out.read_bytes() == whole


@pytest.mark.parametrize("bytes_left", [1, 30, -1])
def test_a_line_that_was_cut(run, fifty, whole, tmp_path, bytes_left):
    out = tmp_path / "whole.jsonl"
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:30]) + lines[30][:bytes_left])
    run(fifty / "requests.jsonl", out=out, options=FIFTY)
    assert out.read_bytes() == whole


# Going on


def test_what_is_answered_is_not_computed_again(run, rows, monkeypatch):
    requests = [{"prompt": f"What is {n}?"} for n in range(3)]
    answers, result = run(requests)
    assert (result.exit_code, sum(rows)) == (0, 3)
    monkeypatch.setattr(running, "load_model", None)  # not reached
    again, result = run(requests)
    assert (again, result.exit_code, sum(rows)) == (answers, 0, 3)


def test_only_batches_that_lack_an_answer_are_computed(run, rows, tmp_path):
    requests = [{"prompt": "What is it? " + "why " * n} for n in range(20)]
    answers, _ = run(requests)
    assert rows == [8, 8, 4]
    del rows[:]
    out = tmp_path / "answers.jsonl"
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]))  # the longest prompt, which is in the first batch
    assert run(requests)[0] == answers
    assert rows == [8]


def test_errors_are_tried_again(run, files, tmp_path, rows):
    clip = tmp_path / "clip.mp4"
    requests = [{}, {"video": str(clip)}]
    answers, result = run(requests)
    assert result.exit_code == 3
    assert list(answers[1]) == ["id", "error"]
    os.link(files / "b.mp4", clip)
    again, result = run(requests)
    assert result.exit_code == 0
    assert again[0] == answers[0]
    assert list(again[1]) == ["id", "answer"]


def test_changed_requests_are_answered_anew(run, rows):
    first, _ = run([{"id": 1}, {"id": 2, "prompt": "What is two?"}, {"id": 3}])
    changed, result = run([{"id": 3}, {"id": 2, "prompt": "What, two?", "max_new_tokens": 2}, {"id": 4}])
    assert "ppllava: 2 answers are dropped, as their requests are others now, or gone\n" in result.stderr
    assert [answer["id"] for answer in changed] == [3, 2, 4]
    assert changed[0] == first[2]
    assert changed[1]["answer"] != first[1]["answer"]


def test_kept_answers_are_those_of_the_file(run, tmp_path):
    requests = [{"id": 1}, {"id": "1"}]
    run(requests)
    out = tmp_path / "answers.jsonl"
    out.write_text('{"id": "1", "answer": "text"}\n{"id": 1, "answer": "number"}\n')
    assert run(requests)[0] == [{"id": 1, "answer": "number"}, {"id": "1", "answer": "text"}]


def test_a_link_stays_one(run, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "answers.jsonl").symlink_to(tmp_path / "place" / "there.jsonl")
    answers, _ = run([{}])
    assert (tmp_path / "answers.jsonl").is_symlink()
    assert json.loads((tmp_path / "place" / "there.jsonl").read_text()) == answers[0]


def test_questions_about_one_clip_encode_it_once(run, monkeypatch):
    calls = []
    encode = PPLlavaModel.encode_chunks
    monkeypatch.setattr(PPLlavaModel, "encode_chunks", lambda *args: calls.append(1) or encode(*args))
    run([{"prompt": f"What is {n}?"} for n in range(5)] + [{"video": "b.mp4"}])
    assert len(calls) == 2


# Options


def test_the_answers_are_those_of_the_python_interface(run, files):
    requests = [
        {"id": 1, "video": "a.mp4", "prompt": QUESTION},
        {"id": 2, "image": "i.png", "prompt": QUESTION},
        {"id": "c", "images": ["i.png", "j.jpg"], "prompt": "Which?", "max_new_tokens": 2},
        {"id": "d", "video": "a.mp4", "prompt": QUESTION, "fps": 3, "start": 0.5, "end": 1.5},
    ]
    answers, result = run(requests)
    assert result.exit_code == 0
    model, processor = presets.build("tiny")
    processor.num_frames = 4
    assert answers == list(ppllava.batch(model, processor, requests, max_new_tokens=4))


@pytest.mark.parametrize(
    ("options", "own"),
    [
        (("--frames", 3), {"frames": 3}),
        (("--fps", 2), {"fps": 2}),
        (("--max-new-tokens", 2), {"max_new_tokens": 2}),
    ],
)
def test_defaults_reach_requests_that_name_none(run, tmp_path, monkeypatch, options, own):
    seen = []
    encode = PPLlavaModel.encode_chunks

    def counted(model, chunks, count):
        seen.append(count)
        return encode(model, chunks, count)

    monkeypatch.setattr(PPLlavaModel, "encode_chunks", counted)
    short = ("--preset", "tiny") if "--max-new-tokens" in options else ("--preset", "tiny", "--max-new-tokens", 4)
    given, _ = run([{}, {"image": "i.png"}], options=(*short, *options))
    named, _ = run([{**own}], out=tmp_path / "named.jsonl", options=(*short, "--tokens", 1000))
    assert "answer" in given[1]
    assert given[0] == named[0]
    assert seen[0] == seen[1] == {"frames": 3, "fps": 4}.get(next(iter(own)), 32)
    both, _ = run(
        [{"frames": 5, "max_new_tokens": 1}], out=tmp_path / "both.jsonl", options=(*short, "--tokens", 2, *options)
    )
    assert "answer" in both[0]
    assert seen[2] == 5


def test_tokens(run, monkeypatch):
    seen = []
    generate = PPLlavaForConditionalGeneration.generate

    def counted(model, mm_encoder_outputs, **kwargs):
        seen.extend(len(row) for row in mm_encoder_outputs["video"].pooler_output)
        return generate(model, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", counted)
    run([{}], "--frames", 8, "--tokens", 7)
    assert seen == [4]


def test_little_memory_makes_smaller_batches(run, rows, tmp_path):
    requests = [{"prompt": "What is it? " + "why " * n} for n in range(8)]
    answers, _ = run(requests)
    assert rows == [8]
    del rows[:]
    assert run(requests, "--memory", 0.0003, out=tmp_path / "small.jsonl")[0] == answers
    assert len(rows) > 1
    assert sum(rows) == 8


def test_compiled_answers_are_the_same(run, tmp_path, monkeypatch):
    caches, compiled, generate = [], [], PPLlavaForConditionalGeneration.generate

    def watched(model, **kwargs):
        caches.append(kwargs.get("cache_implementation"))
        compiled.append(model.model.vision_tower._compiled_call_impl is not None)
        return generate(model, **kwargs)

    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", watched)
    expected, _ = run([{}, {"image": "i.png"}])
    with torch.compiler.set_stance("force_eager"):  # the compiler is not what is tested
        answers, result = run([{}, {"image": "i.png"}], "--compile", out=tmp_path / "compiled.jsonl")
    assert (result.exit_code, answers) == (0, expected)
    assert caches == [None, None]  # on a CPU the decoding step is not compiled
    assert compiled == [False, True]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may multiply in fp8; tests/test_fp8.py has that")
def test_fp8_is_refused_where_it_cannot_run(run, tmp_path):
    pytest.importorskip("torchao", reason="needs torchao; pip install --no-build-isolation '.[fp8]' runs this test")
    _, result = run([{}], "--fp8")
    assert result.exit_code == 4
    assert "--fp8: fp8 needs the model on a CUDA GPU" in result.stderr


def test_blank_lines_a_mark_and_other_ends_of_lines(run):
    line = b'{"id": %d, "video": "a.mp4", "prompt": "What?"}'
    answers, result = run([b"\xef\xbb\xbf" + line % 1 + b"\r", b"", b" \t\r", line % 2])
    assert (result.exit_code, [answer["id"] for answer in answers]) == (0, [1, 2])


def test_progress(run):
    _, result = run([{"prompt": f"What is {n}?"} for n in range(20)])
    done = [line for line in result.stderr.splitlines() if " of 20 requests" in line]
    assert [line.partition(",")[0] for line in done] == [f"ppllava: {n} of 20 requests" for n in range(2, 21, 2)]
    assert all(re.fullmatch(r"[^,]+, [\d.,]+ an? (minute|hour), \d+ s left", line) for line in done[:-1])
    assert re.fullmatch(r"[^,]+, [\d.,]+ an? (minute|hour)", done[-1])
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("before", "seconds", "total", "said"),
    [
        (
            0,
            60,
            200,
            ["20 of 200 requests, 20.0 a minute, 9 min left", "40 of 200 requests, 20.0 a minute, 8 min left"],
        ),
        (80, 1200, 200, ["100 of 200 requests, 1.0 a minute, 1.7 h left"]),
        (0, 6000, 200, ["20 of 200 requests, 12.0 an hour, 15.0 h left"]),
        (0, 1, 200, ["20 of 200 requests, 1,200 a minute, 9 s left"]),
        (180, 60, 200, ["200 of 200 requests, 20.0 a minute"]),
    ],
)
def test_rate_and_time_left(monkeypatch, capsys, before, seconds, total, said):
    """Twenty more requests every so many seconds."""
    now = [0.0]
    monkeypatch.setattr(console._Pace, "now", lambda self: now[0])
    monkeypatch.setattr(console, "OFTEN", 1e9)
    with console.progress(total, before) as advance:
        for _ in said:
            now[0] += seconds
            for _ in range(20):
                advance(1)
    assert capsys.readouterr().err == "".join(f"ppllava: {line}\n" for line in said)


def test_long_jobs_say_something_between_the_tenths(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console._Pace, "now", lambda self: now[0])
    with console.progress(100_000) as advance:
        for _ in range(100):
            now[0] += 10
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ppllava: 31 of 100000 requests, 6.0 a minute, 277.7 h left"
    assert len(lines) == 3


def test_a_bar_where_someone_watches(monkeypatch, capsys):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress(5) as advance:
        advance(2)
        console.note("a.mp4: is cut short")
        advance(3)
    said = stderr.getvalue()
    assert "ppllava: a.mp4: is cut short\n" in said
    assert "5/5" in said
    assert " a minute" in said
    assert " of 5 requests" not in said


def test_help(call):
    shown = call("run", "--help").stdout
    for word in ("--engine", "--memory", "REQUESTS", "Exit codes: 0 ok"):
        assert word in shown
