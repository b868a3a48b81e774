"""`ppllava run`: what is wrong with a request has its own line and costs no other; a wrong option is one sentence."""

import sys

import pytest
import torch
from cli_fixtures import QUICK, call, failed_run, files, run, run_once

from ppllava import PPLlavaForConditionalGeneration, running

# Requests

KEYS = "id, prompt, video, image, images, frames, fps, start, end, max_new_tokens"
NO_OBJECT = "must be one JSON object, and is none "


OWN = object()  # the id that `request_line` gives
# A line, the id in its record, and what the sentence says after the number of the line.
WRONG = [
    ('{"id": 1', None, f"{NO_OBJECT}(Expecting ',' delimiter at column 9)"),
    ("{'id': 1}", None, f"{NO_OBJECT}(Expecting property name enclosed in double quotes at column 2)"),
    ('{"id": 1} {"id": 2}', None, f"{NO_OBJECT}(Extra data at column 11)"),
    ("[1]", None, "a request must be an object with id, prompt and video, got [1]"),
    ("null", None, "a request must be an object with id, prompt and video, got none"),
    (
        b'{"id": "\xff"}',
        None,
        f"{NO_OBJECT}('utf-8' codec can't decode byte 0xff in position 8: invalid start byte)",
    ),
    (b'\xef\xbb\xbf{"id": 1}', None, f"{NO_OBJECT}(Unexpected UTF-8 BOM (decode using utf-8-sig) at column 1)"),
    (b"\x00\x01\x02", None, f"{NO_OBJECT}(Expecting value at column 1)"),
    ("[" * 100_000, None, f"{NO_OBJECT}(maximum recursion depth exceeded"),
    ('{"id": ' + "9" * 5000 + "}", None, f"{NO_OBJECT}(Exceeds the limit (4300 digits) for integer string conv"),
    ('{"id": 1, "id": 2}', None, "a key stands there twice, of id, id; leave one out"),
    ({"id": "r0"}, None, "id 'r0' is that of line 1; give each its own"),
    ({"id": "r0", "prompt": 5}, None, "id 'r0' is that of line 1; give each its own"),
    ({"id": None}, None, "id must be text or a whole number, got none; every answer carries it"),
    ('{"prompt": "?", "video": "a.mp4"}', None, "id must be text or a whole number, got none; every"),
    ({"id": ""}, "", 'id must be text or a whole number, got ""; every answer carries it'),
    ({"id": True}, None, "id must be text or a whole number, got true; every answer carries it"),
    ({"id": 1.0}, None, "id must be text or a whole number, got 1.0; every answer carries it"),
    ({"prompt": " "}, OWN, 'prompt must ask something, got " "; it guides the compression, too'),
    ({"prompt": ["a"]}, OWN, 'prompt must be text, got ["a"]; write the question in quotes'),
    ({"prompt": 5}, OWN, "prompt must be text, got 5; write the question in quotes"),
    ({"prompt": "a\ud800"}, OWN, "prompt must be valid text, got "),
    ({"prompt": "<video>?"}, OWN, "prompt must not hold <video>, which stands for a file; leave it out"),
    (
        '{"id": 1, "prompt": "?"}',
        1,
        "exactly one of video, image and images must be given, got none; ask about one of them",
    ),
    (
        {"video": "a.mp4", "image": "i.png"},
        OWN,
        "exactly one of video, image and images must be given, got video and image; ask about one of them",
    ),
    ({"question": "?"}, OWN, f"unknown keys question; a request has {KEYS}"),
    ({"x": {"y": float("nan")}}, OWN, f"unknown keys x; a request has {KEYS}"),
    ({"frames": 2, "fps": 1}, OWN, "frames and fps exclude each other, got both; leave one out"),
    ({"start": 2, "end": 1}, OWN, "end must not be before start, got 1 and 2"),
    ({"image": "i.png", "frames": 2}, OWN, "frames is for videos, got image; leave it out"),
    ({"images": []}, OWN, "images must be a list of at least one image, got []"),
    ({"images": "i.png"}, OWN, 'images must be a list of at least one image, got "i.png"'),
    ({"images": ["i.png", 1]}, OWN, "images must be the path of a file, got 1"),
    ({"image": ["i.png"]}, OWN, 'image must be the path of a file, got ["i.png"]'),
    ({"video": ["a.mp4", "b.mp4"]}, OWN, 'video must be the path of a file, got ["a.mp4", "b.mp4"]'),
    ({"video": ""}, OWN, 'video must be the path of a file, got ""'),
    ({"video": 7}, OWN, "video must be the path of a file, got 7"),
    (
        {"video": "https://a.b/c.mp4"},
        OWN,
        'video must be the path of a file, got "https://a.b/c.mp4"; download it first',
    ),
    *[
        ({"frames": value}, OWN, f"frames must be a whole number in 1 ... 1048576, got {shown}")
        for value, shown in (("8", '"8"'), (2.0, "2.0"), (0, "0"), (-1, "-1"), (True, "true"), (2**63, str(2**63)))
    ],
    ({"max_new_tokens": 10**400}, OWN, "max_new_tokens must be a whole number in 1 ... 1048576, got 100"),
    *[
        ({"fps": value}, OWN, f"fps must be a number of more than 0 and less than 1e+09, got {shown}")
        for value, shown in (("1", '"1"'), (0, "0"), (-1, "-1"), (float("nan"), "NaN"), (10**400, "1000"))
    ],
    ('{"id": 2, "prompt": "?", "video": "a.mp4", "start": 1e999}', 2, "start must be a number of at least"),
    ({"end": float("-inf")}, OWN, "end must be a number of at least 0 and less than 1e+09, got -Infinity"),
]


@pytest.fixture(scope="module")
def judged(run_once):
    """(answers, result) of a job whose first and last request is one, and all between are not."""
    return run_once([{}, *(line for line, _, _ in WRONG), {"prompt": "What next?"}])


@pytest.mark.parametrize("place", range(1, len(WRONG) + 1), ids=lambda n: f"{str(WRONG[n - 1][0])[:60]}")
def test_wrong_requests(judged, place):
    answers, result = judged
    _, name, text = WRONG[place - 1]
    name, text = f"r{place}" if name is OWN else name, f"line {place + 1}: {text}"
    assert answers[place]["id"] == name
    assert answers[place]["error"].startswith(text)
    said = text if name is None else f"{name}: {text}"
    assert any(note.startswith(f"ppllava: {said}") for note in result.stderr.splitlines())


def test_wrong_requests_cost_no_other(judged):
    answers, result = judged
    assert result.exit_code == 3
    assert [answers[n]["id"] for n in (0, -1)] == ["r0", f"r{len(WRONG) + 1}"]
    assert [*answers[0], *answers[-1]] == ["id", "answer"] * 2
    assert failed_run(result)[1].startswith(f"2 answers and {len(WRONG)} errors in ")


def test_an_id_is_that_of_its_first_line(run, tmp_path):
    """Whatever looks answers up by id finds one record."""
    lines = [{"id": "a", "prompt": 5}, {"id": "a"}, {"id": "b"}, {"id": "b", "prompt": "Why?"}, {"id": 1}, {"id": "1"}]
    answers, _ = run(lines)
    assert [answer["id"] for answer in answers] == ["a", None, "b", None, 1, "1"]
    assert [[*answer][1] for answer in answers] == ["error", "error", "answer", "error", "answer", "answer"]
    assert answers[1]["error"] == "line 2: id 'a' is that of line 1; give each its own"
    assert answers[3]["error"] == "line 4: id 'b' is that of line 3; give each its own"
    before = (tmp_path / "answers.jsonl").read_bytes()
    assert run(lines)[0] == answers
    assert (tmp_path / "answers.jsonl").read_bytes() == before


# What is asked about, and what the error has, with the folder.
UNREADABLE = [
    ({"video": "none.mp4"}, "{}/none.mp4: there is no such file; check the path"),
    ({"video": "text.mp4"}, "{}/text.mp4: FFmpeg finds no video in it"),
    ({"video": "empty.mp4"}, "{}/empty.mp4: "),
    ({"video": "sound.mp4"}, "{}/sound.mp4: "),
    ({"video": "i.png"}, "{}/i.png: "),
    ({"video": "."}, "{}: "),
    ({"video": "a\0.mp4"}, "{}/a"),
    ({"video": "a\ud800.mp4"}, "{}/a"),
    ({"video": "a" * 5000}, "{}/aaa"),
    ({"video": "a.mp4", "start": 9}, "start=9"),
    ({"video": "a.mp4", "fps": 1e8}, ""),
    ({"video": "a.mp4", "frames": 1 << 20}, ""),
    ({"video": "a.mp4", "prompt": "why " * 3000}, "the prompt of "),
    ({"video": "a.mp4", "max_new_tokens": 5000}, "the prompt of "),
    ({"image": "none.png"}, "{}/none.png: there is no such image; check the path"),
    ({"image": "broken.jpg"}, "{}/broken.jpg"),
    ({"image": "a.mp4"}, "{}/a.mp4"),
    ({"image": "."}, "{}"),
    ({"image": "i\0.png"}, "{}/i"),
    ({"images": ["i.png", "none.png"]}, "{}/none.png: "),
]


@pytest.fixture(scope="module")
def unread(run_once):
    """(answers, result) of a job whose first and last request can be answered, and none between."""
    return run_once([{}, *(given for given, _ in UNREADABLE), {"image": "i.png"}])


@pytest.mark.parametrize("place", range(1, len(UNREADABLE) + 1), ids=lambda n: f"{str(UNREADABLE[n - 1][0])[:60]}")
def test_files_that_cannot_be_asked_about(unread, files, place):
    answers, result = unread
    assert result.exit_code == 3, result.stderr
    assert [list(answers[n]) for n in (0, place, -1)] == [["id", "answer"], ["id", "error"], ["id", "answer"]]
    assert UNREADABLE[place - 1][1].format(files) in answers[place]["error"]
    assert "\n" not in answers[place]["error"]
    assert len(answers[place]["error"]) < 6000


def test_ids_of_any_text(run, tmp_path):
    names = ["a\nb", "\u2028", "\ud800", "日本", 10**300, -1, "1", 1]
    answers, result = run([{"id": name} for name in names])
    assert (result.exit_code, [answer["id"] for answer in answers]) == (0, names)
    assert run([{"id": name} for name in names])[1].stderr.startswith("ppllava: 8 of 8 answers are in ")


def test_a_request_that_fails_in_the_model_fails_alone(run, monkeypatch):
    generate = PPLlavaForConditionalGeneration.generate

    def fail(model, input_ids, **kwargs):
        if input_ids.shape[1] > 100:
            raise RuntimeError("too\nlong")
        return generate(model, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", fail)
    answers, result = run([{}, {"prompt": "why " * 30}, {"prompt": "What next?"}])
    assert result.exit_code == 3
    assert [answer.get("error") for answer in answers] == [None, "too long", None]


def test_what_an_engine_forgets_is_an_error(run, monkeypatch):
    engine = running.local_engine
    monkeypatch.setattr(running, "local_engine", lambda *args: (x for x in engine(*args) if x.index != 1))
    answers, result = run([{}, {"prompt": "Lost?"}])
    assert result.exit_code == 3
    assert answers[1] == {"id": "r1", "error": "was lost with the worker that had it; run the command again"}
    monkeypatch.setattr(running, "local_engine", engine)
    assert run([{}, {"prompt": "Lost?"}])[1].exit_code == 0


# Options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "exactly one of --model and --preset must be given, got neither; --model takes a folder"),
        (("--preset", "huge"), "--preset must be one of "),
        ((*QUICK, "--fps", "1"), "--frames and --fps exclude each other, got 4 and 1; leave one out"),
        (("--preset", "tiny", "--fps", "0"), "--fps must be a positive number of frames a second, got 0; try 1"),
        ((*QUICK, "--memory", "0"), "--memory must be GiB, more than 0, got 0; try 8"),
        ((*QUICK, "--memory", "nan"), "--memory must be GiB, more than 0, got nan; try 8"),
        ((*QUICK, "--memory", "inf"), "--memory must be GiB, more than 0, got inf; try 8"),
        ((*QUICK, "--threads", "0"), "Invalid value for '--threads': "),
        (
            (*QUICK, "--workers", "2"),
            "--workers is for --engine ray, got --engine local; leave it out, or see --threads",
        ),
        ((*QUICK, "--engine", "spark"), "Invalid value for '--engine': "),
        ((*QUICK, "--device", "toaster"), "--device must be one of this machine, got 'toaster'; try cpu"),
    ],
)
def test_wrong_usage(run, tmp_path, options, text):
    code, said = failed_run(run([{}], options=options)[1])
    assert code == 2
    assert said.startswith(text)
    assert not list(tmp_path.glob("answers*"))


def test_models_that_cannot_be_loaded(run, tmp_path):
    code, text = failed_run(run([{}], options=("--model", tmp_path / "none"))[1])
    assert code == 4
    assert text.startswith("--model must be a folder that ")


def test_out_of_memory_keeps_the_answers(run, tmp_path, monkeypatch):
    engine = running.local_engine

    def fail(*arguments):
        yield next(engine(*arguments))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(running, "local_engine", fail)
    requests = [{"prompt": f"What is {n}?"} for n in range(3)]
    answers, result = run(requests)
    assert (result.exit_code, answers) == (6, [])
    assert (tmp_path / "answers.jsonl").read_bytes().count(b"\n") == 1
    monkeypatch.setattr(running, "local_engine", engine)
    assert run(requests)[1].exit_code == 0


def test_without_ray(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    remedy = 'in the folder of the sources, pip install --no-build-isolation ".[ray]", or leave it out'
    text = f"--engine ray needs Ray, which is missing; {remedy}"
    assert failed_run(run([{}], "--engine", "ray")[1]) == (2, text)
