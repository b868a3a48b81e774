"""`ppllava ask --each`: one batch that answers as each file alone, in lines, in JSON, and in drawings."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
from cli_fixtures import QUESTION, QUICK, ask, call, files, random, saved, speak

from ppllava import PPLlavaForConditionalGeneration, PPLlavaModel, PPLlavaProcessor, asking

MEDIA = ("a.mp4", "i.png", "b.mp4", "j.jpg")


@pytest.fixture
def ask_each(call):
    """The JSON objects that `ppllava ask --each --json` prints."""

    def run(*arguments):
        result = call("ask", *arguments, "--each", "--json")
        assert result.exit_code == 0, result.stderr
        return [json.loads(line) for line in result.stdout.splitlines()]

    return run


def alone(ask, options, media=MEDIA):
    """The JSON object of each file."""
    return [ask(name, QUESTION, *options, *(("--frames", 4) if name.endswith(".mp4") else ())) for name in media]


def without_times(answers):
    return [{name: value for name, value in answer.items() if name != "timings"} for answer in answers]


@pytest.mark.parametrize("preset", ["tiny", "tiny-btadapter", "tiny-qwen2"])
def test_the_batch_answers_as_each_file_alone(ask, ask_each, call, preset):
    options = ("--preset", preset, "--max-new-tokens", 8)
    singles, answers = alone(ask, options), ask_each(*MEDIA, QUESTION, *options, "--frames", 4)
    assert without_times(answers) == without_times(singles)
    assert len({answer["prompt_tokens"] for answer in answers}) > 1  # there is padding
    assert [list(answer) for answer in answers] == [list(answer) for answer in singles]
    assert all(list(answer["timings"]) == list(singles[0]["timings"]) for answer in answers)
    assert all(answer["timings"] == answers[0]["timings"] for answer in answers)
    result = call("ask", *MEDIA, QUESTION, *options, "--frames", 4, "--each")
    lines = [f"{name}: {' '.join(answer['answer'].splitlines())}\n" for name, answer in zip(MEDIA, singles)]
    assert (result.exit_code, result.stdout, result.stderr) == (0, "".join(lines), random(preset))


def test_it_is_one_batch(ask_each, monkeypatch):
    calls = []

    def count(owner, name):
        function = getattr(owner, name)

        @functools.wraps(function)
        def counted(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(PPLlavaProcessor, "__call__")
    count(PPLlavaModel, "get_media_features")
    count(PPLlavaModel, "encode_frames")
    count(PPLlavaForConditionalGeneration, "generate")
    ask_each(*MEDIA, QUESTION, *QUICK)
    assert calls == ["__call__", "get_media_features", "encode_frames", "generate"]


def test_answers_end_by_themselves_and_padding_is_on_the_left(ask, ask_each, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    processor = PPLlavaProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    processor.save_pretrained(folder)
    assert PPLlavaProcessor.from_pretrained(folder).tokenizer.padding_side == "right"
    options = ("--model", folder, "--max-new-tokens", 12)
    config = json.loads((folder / "generation_config.json").read_text())
    lengths = set()
    for ends in ([2], list(range(5, 40)), list(range(5, 320, 3))):
        (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": ends}))
        answers = ask_each(*MEDIA, QUESTION, *options, "--frames", 4)
        assert without_times(answers) == without_times(alone(ask, options))
        lengths.add(tuple(answer["new_tokens"] for answer in answers))
    assert (12, 12, 12, 12) in lengths
    assert any(len(set(row)) > 2 for row in lengths)


def test_an_only_file_streams(call, monkeypatch):
    arguments = ("ask", "a.mp4", QUESTION, *QUICK)
    assert call(*arguments, "--each").stdout == call(*arguments).stdout
    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", speak("Two\nlines."))
    assert call(*arguments, "--each").stdout == "Two\nlines.\n"


def test_several_answers_are_one_line_each(call, monkeypatch):
    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", speak("Two\nlines.", "One\r\nÇa!!"))
    result = call("ask", "a.mp4", "b.mp4", QUESTION, *QUICK, "--each")
    assert result.stdout == "a.mp4: Two lines.\nb.mp4: One Ça!!\n"


def test_relevance_is_that_of_each_file_alone(call, ask_each, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ppllava.relevance.draw", lambda *arguments: drawn.append(arguments) or arguments[0])
    images = ("--preset", "tiny", "--max-new-tokens", 1, "--relevance", tmp_path / "out.png")
    for name in MEDIA:
        assert call("ask", name, QUESTION, *images, *(("--frames", 4) if name.endswith("mp4") else ())).exit_code == 0
    singles = drawn[:]
    for media, options in ((MEDIA, ("--frames", 4)), (("i.png", "j.jpg"), ())):
        drawn.clear()
        answers = ask_each(*media, QUESTION, *images, *options)
        written = [str(tmp_path / f"out-{number}.png") for number, _ in enumerate(media, start=1)]
        assert [answer["relevance"] for answer in answers] == [[path] for path in written]
        for name, (frames, relevance, limits) in zip(media, drawn, strict=True):
            expected = singles[MEDIA.index(name)]
            np.testing.assert_array_equal(frames, expected[0])
            np.testing.assert_allclose(relevance, expected[1], rtol=1e-4)
            np.testing.assert_allclose(limits, expected[2], rtol=1e-4)


def test_the_longest_prompt_decides(call, ask, monkeypatch):
    longest = ask("i.png", QUESTION, "--preset", "tiny", "--max-new-tokens", 1)
    length, visual = longest["prompt_tokens"], longest["media"][0]["visual_tokens"]
    assert length > ask("a.mp4", QUESTION, *QUICK)["prompt_tokens"]
    fits = 2048 - length
    monkeypatch.setattr(asking, "load_model", None)  # not reached
    options = ("--preset", "tiny", "--frames", 4, "--max-new-tokens", fits + 1)
    result = call("ask", "a.mp4", "i.png", "b.mp4", QUESTION, *options, "--each")
    assert (result.exit_code, result.stdout, result.stderr) == (
        5,
        "",
        f"ppllava: the longest prompt of {length} tokens, {visual} of them visual, and --max-new-tokens {fits + 1} "
        f"must fit into the 2048 of the model; pass at most --max-new-tokens {fits}, or pass fewer --frames or "
        "--tokens, or a shorter question\n",
    )
    result = call("ask", "a.mp4", "b.mp4", "why " * 600, *QUICK, "--each")
    note, text = result.stderr.splitlines()  # one note for both
    assert note.startswith("ppllava: guide_text of ")
    assert result.exit_code == 5
    assert re.fullmatch(
        r"ppllava: the longest prompt has \d+ tokens, 8 of them visual, and with the answer it must fit into the 2048 "
        "of the model; pass fewer --frames or --tokens, or a shorter question",
        text,
    )


def test_a_file_that_cannot_be_read_ends_it(call, files, monkeypatch):
    monkeypatch.setattr(asking, "load_model", None)  # not reached
    result = call("ask", "a.mp4", "none.mp4", QUESTION, *QUICK, "--each")
    text = f"ppllava: none.mp4: there is no such file; check the path, relative ones start at {files}\n"
    assert (result.exit_code, result.stdout, result.stderr) == (3, "", text)
