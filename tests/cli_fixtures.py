"""`ppllava` in a folder of clips and images, for test_cli*.py."""

import copy
import functools
import json

import clips
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ppllava import cli, presets

QUESTION = "What is it?"
QUICK = ("--preset", "tiny", "--frames", "4", "--max-new-tokens", "4")


def random(preset):
    """What stderr says beside every answer of a preset."""
    return (
        f"ppllava: the preset {preset} has random weights: what it answers means nothing; --model takes a trained one\n"
    )


RANDOM = random("tiny")


def speak(*texts, pause=lambda: None):
    """A `generate` that says these, one to each prompt, byte by byte."""

    def generate(model, input_ids, streamer, **kwargs):
        streamer.put(input_ids)
        rows = streamer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for tokens in zip(*rows, strict=True):
            streamer.put(torch.tensor(tokens))
            pause()
        streamer.end()

    return generate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a.mp4 of 60 frames in 2 seconds, b.mp4 of 30 in 1, i.png, j.jpg, and what is none of these."""
    folder = tmp_path_factory.mktemp("files")
    clips.encode(folder / "a.mp4", 60)
    clips.encode(folder / "b.mp4", 30, size=(96, 64))
    clips.encode(folder / "g.gif", 12, codec="gif", fps=10)
    Image.fromarray(clips.draw(3, 80, 60)).save(folder / "i.png")
    Image.fromarray(clips.draw(5, 40, 90)).save(folder / "j.jpg")
    clips.encode_audio(folder / "sound.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "broken.jpg").write_bytes((folder / "j.jpg").read_bytes()[:300])
    return folder


def invoke(*arguments, env=None):
    """The result of `ppllava` in this process."""
    runner = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "PPLLAVA_DEBUG": None})
    return runner.invoke(cli.app, [str(argument) for argument in arguments], env=env)


build_model = functools.cache(presets.build_model)


@pytest.fixture
def call(files, monkeypatch):
    """Runs `ppllava` in that folder, with copies of presets, whose building takes half of the time of an answer."""
    monkeypatch.chdir(files)
    monkeypatch.setattr(presets, "build_model", lambda *args, **options: copy.deepcopy(build_model(*args, **options)))
    return invoke


@pytest.fixture
def ask(call):
    """The JSON object that `ppllava ask --json` prints."""

    def run(*arguments):
        result = call("ask", *arguments, "--json")
        preset = arguments[arguments.index("--preset") + 1] if "--preset" in arguments else None
        assert (result.exit_code, result.stderr) == (0, random(preset) if preset else ""), result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture
def run(call, tmp_path):
    """Runs `ppllava run` on requests, or lines, or the path of a file of them; the answers, where it came to its end,
    and its result. A request gets what it lacks of an id, the clip a.mp4 and a question."""

    def answer(requests, *arguments, out=tmp_path / "answers.jsonl", options=QUICK):
        return answer_all(tmp_path, requests, out, *options, *arguments)

    return answer


@pytest.fixture(scope="module")
def run_once(files, tmp_path_factory):
    """As `run`, for tests that look at one job together."""

    def answer(requests):
        folder = tmp_path_factory.mktemp("job")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(files)
            return answer_all(folder, requests, folder / "answers.jsonl", *QUICK)

    return answer


def answer_all(folder, requests, out, *arguments):
    if isinstance(requests, list):
        path = folder / "requests.jsonl"
        path.write_bytes(b"\n".join(request_line(given, n) for n, given in enumerate(requests)))
        requests = path
    result = invoke("run", requests, "-o", out, *arguments)
    complete = result.exit_code in (0, 3)
    return [json.loads(line) for line in out.read_bytes().splitlines()] if complete else [], result


def request_line(given, number):
    if not isinstance(given, dict):
        return given if isinstance(given, bytes) else given.encode()
    medium = {} if given.keys() & {"video", "image", "images"} else {"video": "a.mp4"}
    return json.dumps({"id": f"r{number}", "prompt": QUESTION, **medium, **given}).encode()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny model as a folder."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = presets.build("tiny", seed=3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def failed_run(result):
    """(exit code, the last sentence)."""
    assert result.stdout == ""
    return result.exit_code, result.stderr.splitlines()[-1].removeprefix("ppllava: ")
