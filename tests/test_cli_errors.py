"""`ppllava`: each exit code, and the sentence that comes with it."""

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import warnings

import pytest
import torch
from cli_fixtures import QUESTION, QUICK, RANDOM, call, files, run, saved

import ppllava_command
from ppllava import PPLlavaForConditionalGeneration, asking, presets, turns


def failure(result):
    """(exit code, what stderr says) of a command that wrote no answer."""
    assert result.stdout == ""
    assert result.stderr.startswith("ppllava: ")
    assert result.stderr.endswith("\n")
    return result.exit_code, result.stderr.removeprefix("ppllava: ").removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["a.mp4"],
            "ask needs one or more files and then the question, got 'a.mp4' as the last argument; write for example: "
            "ppllava ask clip.mp4 'What happens?'",
        ),
        (
            [QUESTION, "a.mp4", "--preset", "tiny"],
            "ask needs one or more files and then the question, got 'a.mp4' as the last argument; write for example: "
            "ppllava ask clip.mp4 'What happens?'",
        ),
        (["a.mp4", " "], "QUESTION must ask something, got an empty text; it guides the compression, too"),
        (["a.mp4", QUESTION], "exactly one of --model and --preset must be given, got neither; --model takes a folder"),
        (
            ["a.mp4", QUESTION, "--preset", "tiny", "--model", "."],
            "exactly one of --model and --preset must be given, got both; --model takes a folder",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "huge"],
            f"--preset must be one of {', '.join(presets.NAMES)}, got 'huge'",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--fps", "2"],
            "--frames and --fps exclude each other, got 4 and 2; leave one out",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "tiny", "--fps", "0"],
            "--fps must be a positive number of frames a second, got 0; try 1",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--start", "2", "--end", "1.5"],
            "--end must not be before --start, got 1.5 and 2; swap them",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--start", "9"],
            "a.mp4: start=9.0 is after the end of the clip at 2.000 s; pass an earlier start",
        ),
        (["i.png", QUESTION, *QUICK], "--frames is for videos, got images only; leave it out"),
        (
            ["i.png", QUESTION, "--preset", "tiny", "--tokens", "4"],
            "--tokens is for videos, got images only; leave it out",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--device", "toaster"],
            "--device must be one of this machine, got 'toaster'; try cpu",
        ),
        (
            ["a.mp4", "What is <video>?", *QUICK],
            "QUESTION must not hold <video>, which stands for a file; leave it out",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--relevance", "out.jpg"],
            "--relevance must end in .png or .mp4, got 'out.jpg'; the ending says what is drawn",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--relevance", "none/out.png"],
            "--relevance must be in a folder that exists, got 'none/out.png'; make 'none'",
        ),
        (
            ["a.mp4", "i.png", QUESTION, *QUICK, "--relevance", "out.mp4"],
            "--relevance draws images as .png only, got 'out.mp4' for 'i.png'; write .png",
        ),
        (
            ["a.mp4", "What\udcff?", *QUICK],
            "QUESTION must be valid text, got 'What\\udcff?'; write it in UTF-8, in a UTF-8 locale",
        ),
        (
            ["a.mp4", QUESTION, *QUICK, "--temperature", "1e-40"],
            "--temperature must be 0, or in 0.001 ... 1000, got 1e-40; 0 takes the likeliest token",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "tiny", "--fps", "1e9"],
            "a.mp4: has more frames asked for than can be held at once; pass fewer --frames, a lower --fps, or a part "
            "of it with --start and --end",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "tiny", "--frames", "1000000", "--tokens", "4"],
            "a.mp4: has more frames asked for than can be held at once; pass fewer --frames, a lower --fps, or a part "
            "of it with --start and --end",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "tiny-btadapter", "--frames", "65"],
            "videos must have at most 64 frames for the BT-Adapter of this model, got 65; pass --frames 64",
        ),
        (
            ["a.mp4", QUESTION, "--preset", "tiny-btadapter", "--fps", "100"],
            "videos must have at most 64 frames for the BT-Adapter of this model, got 197; pass --frames 64",
        ),
        (
            [*["i.png"] * 65, QUESTION, "--preset", "tiny-btadapter"],
            "at most 64 images can be asked about together with the BT-Adapter of this model, got 65; pass fewer, or "
            "--each",
        ),
        (["a.mp4", QUESTION, "--xyz"], "No such option: --xyz; --help lists what there is"),
        ([], "Missing argument 'MEDIA... QUESTION'; --help lists what there is"),
    ],
)
def test_wrong_usage(call, monkeypatch, arguments, text):
    monkeypatch.setattr(asking, "load_model", None)  # not reached
    assert failure(call("ask", *arguments)) == (2, text)


@pytest.mark.parametrize(
    ("option", "most"),
    [("--frames", 2**20), ("--tokens", 2**20), ("--max-new-tokens", 2**20), ("--seed", 2**64 - 1)],
)
@pytest.mark.parametrize("more", [1, 10**30])
def test_numbers_are_bounded(call, monkeypatch, option, most, more):
    monkeypatch.setattr(asking, "load_processor", None)  # not reached
    code, text = failure(call("ask", "a.mp4", QUESTION, "--preset", "tiny", option, most + more))
    assert code == 2
    assert text.startswith(f"Invalid value for '{option}': ")
    assert str(most) in text


@pytest.mark.parametrize(
    ("media", "given", "target"),
    [
        (["a.mp4"], "a.mp4", "a.mp4"),
        (["i.png"], "./i.png", "i.png"),
        (["a.mp4"], "link.mp4", "link.mp4"),
        (["out-1.mp4", "b.mp4"], "out.mp4", "out-1.mp4"),
        (["a.mp4", "out-1.mp4", "out-2.mp4"], "out.mp4", "out-1.mp4"),
    ],
)
def test_relevance_spares_its_input(call, files, monkeypatch, media, given, target):
    monkeypatch.setattr(asking, "load_processor", None)  # not reached
    for number in (1, 2):
        shutil.copy(files / "a.mp4", files / f"out-{number}.mp4")
    (files / "link.mp4").unlink(missing_ok=True)
    (files / "link.mp4").symlink_to("a.mp4")
    before = {name: (files / name).read_bytes() for name in media}
    assert failure(call("ask", *media, QUESTION, "--preset", "tiny", "--relevance", given)) == (
        2,
        f"--relevance must not overwrite what is asked about, got '{target}'; choose another name",
    )
    assert {name: (files / name).read_bytes() for name in media} == before


def test_relevance_that_cannot_be_written(call, files, monkeypatch, tmp_path):
    monkeypatch.setattr(asking, "load_processor", None)  # not reached
    for name in ("folder.png", "folder-2.png"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    long = "x" * 250
    for media, name, target, reason in (
        (["a.mp4"], "folder", "folder", "it is no regular file"),
        (["a.mp4"], "pipe", "pipe", "it is no regular file"),
        (["a.mp4", "b.mp4"], "folder", "folder-2", "it is no regular file"),
        (["a.mp4", "b.mp4"], long, f"{long}-1", os.strerror(errno.ENAMETOOLONG)),
    ):
        given, path = tmp_path / f"{name}.png", tmp_path / f"{target}.png"
        assert failure(call("ask", *media, QUESTION, *QUICK, "--relevance", given)) == (
            2,
            f"--relevance must be a file that can be written, got '{path}' ({reason}); choose another place",
        )
    assert sorted(os.listdir(tmp_path)) == ["folder-2.png", "folder.png", "pipe.png"]


def test_relevance_needs_matplotlib(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert failure(call("ask", "a.mp4", QUESTION, *QUICK, "--relevance", "out.png")) == (
        2,
        "--relevance needs matplotlib, which is missing; pip install matplotlib",
    )


def test_options_that_need_another_pooling(call, saved, tmp_path):
    for name in os.listdir(saved):
        os.symlink(saved / name, tmp_path / name)
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "pooling": "temporal_mean"}))
    (tmp_path / "model.safetensors").unlink()  # the weights are not reached
    assert failure(call("ask", "a.mp4", QUESTION, "--model", tmp_path, "--relevance", "out.png")) == (
        2,
        "--relevance needs the pooling 'prompt_guided', this model has 'temporal_mean'; leave it out",
    )
    assert failure(call("ask", "a.mp4", QUESTION, "--model", tmp_path, "--tokens", 4)) == (
        2,
        "--tokens needs a model whose pooling has a budget, got 'temporal_mean'; use fewer --frames",
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none.mp4", "none.mp4: there is no such file; check the path, relative ones start at {folder}"),
        ("none.png", "none.png: there is no such file; check the path, relative ones start at {folder}"),
        ("empty.mp4", "empty.mp4: is empty (0 bytes); download or copy it again"),
        (".", ".: is a directory; pass the path of one video file"),
        ("sound.mp4", "sound.mp4: holds no video, only sound, a cover picture or data; pass a video file"),
        (
            "text.mp4",
            "text.mp4: FFmpeg finds no video in it; it is damaged, cut short before its index, or another kind of file "
            "(playlists, images and text are refused), so pass a complete video file",
        ),
    ],
)
def test_files_that_cannot_be_read(call, files, name, text):
    assert failure(call("ask", "a.mp4", name, QUESTION, *QUICK)) == (3, text.format(folder=files))


def test_an_image_that_cannot_be_read(call):
    code, text = failure(call("ask", "broken.jpg", QUESTION, "--preset", "tiny"))
    assert code == 3
    assert re.fullmatch(r"broken\.jpg: cannot be read as an image \(.*\); pass a file that Pillow opens", text)


def test_models_that_cannot_be_loaded(call, saved, tmp_path):
    def sentence(folder):
        code, text = failure(call("ask", "a.mp4", QUESTION, "--frames", 4, "--model", folder))
        assert code == 4
        return text

    assert sentence("no/where") == (
        "--model must be a folder that `save_pretrained` or `ppllava convert` wrote, got 'no/where', which is no "
        "folder; download it first"
    )
    start = f"the model in '{tmp_path}' cannot be loaded: "
    assert sentence(tmp_path).startswith(start)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert sentence(tmp_path) == (
        f"{start}config.json must have model_type 'ppllava', got 'llava'; pass the folder of a PPLLaVA"
    )
    (tmp_path / "config.json").unlink()
    for name in os.listdir(saved):
        os.symlink(saved / name, tmp_path / name)
    (tmp_path / "model.safetensors").unlink()
    assert sentence(tmp_path).startswith(start)
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:5000])
    assert sentence(tmp_path).startswith(start)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("chat_template.jinja", "{% for", "its chat template fails (unexpected 'end of template'); "),
        ("chat_template.jinja", "{{ 1 / 0 }}", "its chat template fails (division by zero); "),
        ("chat_template.jinja", "Hi", "its chat template must write one <video> for each video, got 0 for 1; "),
        ("generation_config.json", '{"num_return_sequences": 3}', ""),
        ("generation_config.json", '{"repetition_penalty": -1.0}', ""),
        ("generation_config.json", '{"eos_token_id": "x"}', ""),
    ],
)
def test_models_that_cannot_answer(call, saved, tmp_path, name, text, reason):
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).write_text(text)
    code, text = failure(call("ask", "a.mp4", QUESTION, "--frames", 4, "--model", folder))
    assert code == 4
    cannot = "be loaded: |answer with its generation_config.json: "
    assert re.match(f"the model in '{folder}' cannot ({cannot}){re.escape(reason)}", text)


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end(call, run, saved, tmp_path, monkeypatch):
    """`ask` renders it once, `run` before all requests and for each."""
    monkeypatch.setattr(turns, "SECONDS", 0.2)
    folder = shutil.copytree(saved, tmp_path / "model")
    template = (folder / "chat_template.jinja").read_text()
    text = "its chat template fails (it has not ended after 0.2 s); convert the model again, or mend the template"
    (folder / "chat_template.jinja").write_text(LOOP + template)
    sentence = f"the model in '{folder}' cannot be loaded: {text}"
    assert failure(call("ask", "a.mp4", QUESTION, "--frames", 4, "--model", folder)) == (4, sentence)
    assert run([{}], options=("--model", folder))[1].exit_code == 4
    about = "{% if messages[0]['content'][-1]['text'] == 'Loop?' %}" + LOOP + "{% endif %}"
    (folder / "chat_template.jinja").write_text(about + template)
    options = ("--model", folder, "--frames", 4, "--max-new-tokens", 2)
    answers, _ = run([{}, {"prompt": "Loop?"}, {"prompt": "Why?"}], options=options)
    assert [[*answer][1] for answer in answers] == ["answer", "error", "answer"]
    assert answers[1]["error"] == "it has not ended after 0.2 s"


def test_long_videos_are_not_decoded_in_vain(call, monkeypatch):
    monkeypatch.setattr(asking, "read", None)  # not reached
    what = "tokens of videos alone, and with question and answer it must fit into the 2048 of the model"
    for arguments, text in (
        (["a.mp4", QUESTION], f"the prompt has 4096 {what}; pass fewer --frames, fewer files or --tokens"),
        (["a.mp4", "b.mp4", QUESTION], f"the prompt has 8192 {what}; pass fewer --frames, fewer files or --tokens"),
        (
            ["a.mp4", "i.png", QUESTION, "--each"],
            f"the longest prompt has 4096 {what}; pass fewer --frames or --tokens",
        ),
    ):
        assert failure(call("ask", *arguments, "--preset", "tiny", "--frames", 2048)) == (5, text)


def test_prompts_that_do_not_fit(call):
    code, text = failure(call("ask", "a.mp4", QUESTION, *QUICK, "--max-new-tokens", 2040))
    length = int(re.search(r"prompt of (\d+)", text)[1])
    shorten = "pass fewer --frames or --tokens, fewer files, or a shorter question"
    assert (code, text) == (
        5,
        f"the prompt of {length} tokens, 8 of them visual, and --max-new-tokens 2040 must fit into the 2048 of the "
        f"model; pass at most --max-new-tokens {2048 - length}, or {shorten}",
    )
    result = call("ask", "a.mp4", "why " * 600, *QUICK)
    text = result.stderr.splitlines()[-1]  # after a note that the question is too long for the guide
    length = int(re.search(r"has (\d+)", text)[1])
    assert length > 2400
    assert (result.exit_code, text) == (
        5,
        f"ppllava: the prompt has {length} tokens, 8 of them visual, and with the answer it must fit into the 2048 "
        f"of the model; {shorten}",
    )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError("of Python"),
    ],
)
@pytest.mark.parametrize("where", ["load_model", "encode"])
def test_out_of_memory(call, monkeypatch, where, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(asking, where, fail)
    assert failure(call("ask", "a.mp4", QUESTION, *QUICK)) == (
        6,
        f"out of memory ({error}); pass fewer files, --frames or --tokens, --dtype bfloat16, or another --device",
    )


def test_interrupted(call, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", fail)
    result = call("ask", "a.mp4", QUESTION, *QUICK)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", f"{RANDOM}ppllava: interrupted\n")


def test_bugs_say_so_and_debug_shows_where(call, monkeypatch):
    def fail(*_):
        raise KeyError("oops")

    monkeypatch.setattr(asking, "encode", fail)
    text = "this should not happen, please report it: KeyError: 'oops'; PPLLAVA_DEBUG=1 shows where"
    assert failure(call("ask", "a.mp4", QUESTION, *QUICK)) == (1, text)
    shown = call("ask", "a.mp4", QUESTION, *QUICK, env={"PPLLAVA_DEBUG": "1"})
    assert shown.exit_code == 1
    assert "Traceback" in shown.stderr
    assert shown.stderr.endswith(f"ppllava: {text}\n")


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError])
def test_convert_fails(call, monkeypatch, error):
    def fail(*_, **__):
        raise error("the weights must be complete, got half of them; pass --base")

    monkeypatch.setattr("ppllava.convert.convert_checkpoint", fail)
    assert failure(call("convert", "source", "target")) == (
        4,
        "the weights must be complete, got half of them; pass --base",
    )


def test_without_typer(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "ppllava.cli", raising=False)
    with pytest.raises(SystemExit) as ended:
        ppllava_command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        'ppllava: the command line needs typer, which is missing; run pip install --no-build-isolation ".[cli]" in the '
        "folder of the sources\n"
    )


def test_no_temporary_folder(monkeypatch):
    """PyTorch wants one at its import; what it raises the second time names none."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError("none")))
    with pytest.raises(ppllava_command.ImportFailure) as error, ppllava_command.importing():
        raise AssertionError("Artifact already registered")
    text = "no temporary folder can be written; free some space, or set TMPDIR to a folder that has some"
    assert str(error.value) == text


def test_a_warning_of_an_import_is_a_line(capsys):
    with ppllava_command.warning():
        warnings.warn("ppllava was not tested with av 99", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "ppllava: was not tested with av 99\n"
