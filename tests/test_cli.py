"""`ppllava ask`, `convert` and `presets`: answers, drawings, and what is printed where."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import torch
from cli_fixtures import QUESTION, QUICK, RANDOM, ask, call, files, saved, speak
from PIL import Image

from ppllava import PPLlavaForConditionalGeneration, PPLlavaModel, asking, cli, presets
from ppllava.video import open_video, read_video

ROOT = Path(__file__).parent.parent


def expected(media, question=QUESTION, new=4):
    """The answer by the Python interface."""
    model, processor = presets.build("tiny")
    blocks = [*media, {"type": "text", "text": question}]
    conversation = [{"role": "user", "content": blocks}]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def video(path, frames=4):
    return {"type": "video", "video": read_video(path, num_frames=frames)}


# Answers


def test_the_answer_is_that_of_the_python_interface(call, files):
    result = call("ask", "a.mp4", QUESTION, *QUICK)
    assert (result.exit_code, result.stderr) == (0, RANDOM)
    assert result.stdout.strip() == expected([video(files / "a.mp4")])


def test_several_files_come_in_order(ask, files):
    answer = ask("a.mp4", "i.png", "b.mp4", "j.jpg", QUESTION, *QUICK)
    images = {name: {"type": "image", "image": Image.open(files / name)} for name in ("i.png", "j.jpg")}
    media = [video(files / "a.mp4"), images["i.png"], video(files / "b.mp4"), images["j.jpg"]]
    assert answer["answer"] == expected(media)
    assert [(medium["path"], medium["kind"], medium["frames"]) for medium in answer["media"]] == [
        ("a.mp4", "video", 4),
        ("i.png", "image", 1),
        ("b.mp4", "video", 4),
        ("j.jpg", "image", 1),
    ]
    assert [medium["visual_tokens"] for medium in answer["media"]] == [8, 4, 8, 4]
    assert "indices" not in answer["media"][1]


def test_one_image_has_high_resolution_views(ask, files):
    answer = ask("i.png", QUESTION, "--preset", "tiny", "--max-new-tokens", "4")
    assert answer["answer"] == expected([{"type": "image", "image": Image.open(files / "i.png")}])
    _, processor = presets.build("tiny")
    assert answer["media"][0]["visual_tokens"] == processor.num_image_tokens(60, 80) > 4


def test_json(ask, files):
    answer = ask("a.mp4", QUESTION, *QUICK)
    clip = read_video(files / "a.mp4", num_frames=4)
    times = answer.pop("timings")
    assert answer == {
        "answer": expected([video(files / "a.mp4")]),
        "model": "tiny",
        "media": [
            {
                "path": "a.mp4",
                "kind": "video",
                "frames": 4,
                "indices": clip.indices.tolist(),
                "timestamps": clip.timestamps.tolist(),
                "visual_tokens": 8,
            }
        ],
        "prompt_tokens": answer["prompt_tokens"],
        "new_tokens": 4,
        "relevance": [],
    }
    assert list(times) == ["load", "read", "encode", "generate", "first_token", "total"]
    assert all(seconds > 0 for seconds in times.values())
    assert times["first_token"] < times["generate"] < times["total"]


def test_frames_default_to_the_processor(ask):
    answer = ask("a.mp4", QUESTION, "--preset", "tiny", "--max-new-tokens", "1")
    assert answer["media"][0]["frames"] == presets.build("tiny")[1].num_frames == 32


@pytest.mark.parametrize(("tokens", "used"), [(1, 1), (7, 4), (12, 12), (10000, 16)])
def test_tokens(ask, tokens, used):
    answer = ask("a.mp4", "b.mp4", QUESTION, *QUICK, "--frames", 8, "--tokens", tokens)
    assert [medium["visual_tokens"] for medium in answer["media"]] == [used, used]


def test_fps_start_and_end(ask):
    answer = ask("a.mp4", QUESTION, "--preset", "tiny", "--max-new-tokens", 1, "--fps", 5, "--start", 0.5, "--end", 1.5)
    np.testing.assert_allclose(answer["media"][0]["timestamps"], [0.5, 0.7, 0.9, 1.1, 1.3, 1.5], atol=0.02)
    answer = ask("a.mp4", QUESTION, *QUICK, "--start", 1.0)
    assert min(answer["media"][0]["timestamps"]) >= 1.0
    answer = ask("a.mp4", QUESTION, *QUICK, "--end", 0.5)
    assert max(answer["media"][0]["timestamps"]) <= 0.5


def test_kinds(files, tmp_path):
    still, moving, mislabelled = tmp_path / "still.gif", tmp_path / "moving.png", tmp_path / "photo.bin"
    pictures = [Image.fromarray(clips.draw(i, 40, 30)) for i in range(3)]
    pictures[0].save(still)
    pictures[0].save(moving, save_all=True, append_images=pictures[1:])
    pictures[0].save(mislabelled, format="JPEG")
    pictures[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "moving.webp", save_all=True, append_images=pictures[1:])
    names = ("a.mp4", "g.gif", "i.png", "j.jpg", "text.mp4", "broken.jpg", "none.png")
    assert [asking.kind_of(str(files / name)) for name in names] == [
        *("video", "video", "image", "image", "video", "image", "video")
    ]
    assert [asking.kind_of(str(path)) for path in (still, moving, mislabelled)] == ["image", "video", "image"]
    assert [asking.kind_of(str(tmp_path / name)) for name in ("phone.jpg", "moving.webp")] == ["image", "image"]


def test_an_animated_webp_is_its_first_frame(ask, tmp_path):
    pictures = [Image.fromarray(clips.draw(i, 40, 30)) for i in range(3)]
    pictures[0].save(tmp_path / "one.webp", lossless=True)
    pictures[0].save(tmp_path / "moving.webp", lossless=True, save_all=True, append_images=pictures[1:])
    options = ("--preset", "tiny", "--max-new-tokens", 4)
    one, moving = (ask(tmp_path / name, QUESTION, *options) for name in ("one.webp", "moving.webp"))
    assert (moving["answer"], moving["media"][0]["kind"]) == (one["answer"], "image")


def test_an_animated_gif_is_a_video(ask, files):
    assert ask("g.gif", QUESTION, *QUICK)["media"][0]["indices"] == read_video(files / "g.gif", 4).indices.tolist()


def test_sampling_has_a_seed(ask):
    first, again, other = (ask("a.mp4", QUESTION, *QUICK, "--temperature", 5, "--seed", seed) for seed in (1, 1, 2))
    assert first["answer"] == again["answer"] != other["answer"]


def test_a_saved_model(ask, saved):
    arguments = ("a.mp4", QUESTION, "--frames", 4, "--max-new-tokens", 4)
    answer = ask(*arguments, "--model", saved)
    assert answer["model"] == str(saved)
    assert answer["answer"] != ask(*arguments, "--preset", "tiny")["answer"]
    assert ask(*arguments, "--model", saved, "--tokens", 3)["media"][0]["visual_tokens"] <= 3
    assert ask(*arguments, "--model", saved, "--dtype", "bfloat16")["new_tokens"] == 4


def test_a_clip_is_decoded_and_encoded_once(ask, monkeypatch):
    calls = []

    def counted(name, function):
        def wrapper(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr("ppllava.video.read_video", counted("read", read_video))
    monkeypatch.setattr(PPLlavaModel, "encode_frames", counted("encode", PPLlavaModel.encode_frames))
    ask("a.mp4", QUESTION, *QUICK)
    assert calls == ["read", "encode"]


def test_the_answer_streams(call, monkeypatch):
    seen = []
    generate = speak("A cat. Ça va?", pause=lambda: seen.append(sys.stdout.buffer.getvalue().decode()))
    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", generate)
    result = call("ask", "a.mp4", QUESTION, *QUICK)
    assert result.stdout == "A cat. Ça va?\n"
    # Word by word; since transformers 5.24 letter by letter, but never half of one.
    assert {"A ", "A cat. ", "A cat. Ça "} <= set(seen)
    assert all("A cat. Ça va?".startswith(text) for text in seen)


def test_damaged_files_and_long_questions_are_noted(call, files, tmp_path):
    whole = clips.encode(tmp_path / "clip.mp4", container_options={"movflags": "faststart"})
    short = clips.cut(whole, 0.6)
    result = call("ask", short, "why " * 100, *QUICK)
    assert result.exit_code == 0
    notes = result.stderr.splitlines()
    assert re.fullmatch(rf"ppllava: {short}: is cut short, \d+ frames exist of about 60; only those are read", notes[0])
    assert re.fullmatch(
        r"ppllava: guide_text of \d+ tokens is longer than the 248 of the guide: .*; pass a shorter guide_text",
        notes[1],
    )
    assert notes[2:] == [RANDOM.rstrip()]


# Relevance


def draw(call, *arguments):
    """The JSON object of a call that also says what it wrote."""
    result = call("ask", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert result.stderr == RANDOM + "".join(f"ppllava: wrote {path}\n" for path in answer["relevance"])
    return answer


def relevance_map(*media):
    """float32 [T, H, W] of the only group of images or video."""
    model, processor = presets.build("tiny")
    content = [*media, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    names = ("pixel_values", "image_sizes", "image_views", "image_groups", "pixel_values_videos", "video_frames")
    guide = ("guide_input_ids", "guide_attention_mask")
    with torch.no_grad():
        features = model.get_media_features(**{name: inputs[name] for name in (*names, *guide) if name in inputs})
    (output,) = features.values()
    return output.relevance[0].numpy()


def test_relevance_as_a_clip(call, files, tmp_path):
    path = tmp_path / "out.mp4"
    answer = draw(call, "b.mp4", QUESTION, *QUICK, "--frames", 6, "--relevance", path)
    assert answer["relevance"] == [str(path)]
    reader = open_video(path)
    clip = read_video(files / "b.mp4", num_frames=6)
    assert len(reader) == 6
    assert reader.fps == pytest.approx(5 / (clip.timestamps[-1] - clip.timestamps[0]), rel=0.01)
    frames = reader.get_frames(range(6))
    assert frames.shape == clip.frames.shape
    relevance = relevance_map({"type": "video", "video": clip})  # [6, 6, 6]
    magenta = frames[..., [0, 2]].mean(-1) - frames[..., 1]  # [6, 64, 96]; the noise of the clip has none on average
    patches = [np.asarray(Image.fromarray(x.astype(np.float32)).resize((6, 6), Image.Resampling.BOX)) for x in magenta]
    assert relevance.flat[np.argmax(patches)] > 0.8 * relevance.max()
    with av.open(str(path)) as container:
        assert container.metadata["title"] == "b.mp4: \u201cWhat is it?\u201d"
        assert container.metadata["comment"].endswith("The preset tiny has random weights: this map means nothing.")


def test_relevance_as_a_sheet(call, tmp_path):
    path = tmp_path / "out.png"
    assert draw(call, "a.mp4", QUESTION, *QUICK, "--relevance", path)["relevance"] == [str(path)]
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert 400 < sheet.width <= 1600


def test_relevance_of_several_files(call, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr("ppllava.relevance.save_png", lambda *arguments: sheets.append(arguments))
    answer = draw(call, "i.png", "a.mp4", "j.jpg", QUESTION, *QUICK, "--relevance", tmp_path / "out.png")
    assert answer["relevance"] == [str(tmp_path / f"out-{number}.png") for number in (1, 2, 3)]
    paths, frames, times, titles, ends, remarks = zip(*sheets)
    assert [str(path) for path in paths] == answer["relevance"]
    assert [np.shape(x) for x in frames] == [(1, 60, 80, 3), (4, 48, 64, 3), (1, 90, 40, 3)]
    assert times[0] is times[2] is None
    assert times[1].tolist() == answer["media"][1]["timestamps"]
    assert titles == tuple(f"{name}: \u201cWhat is it?\u201d" for name in ("i.png", "a.mp4", "j.jpg"))
    assert ends[0] == ends[2] != ends[1]
    scales = ["these 2 images", "this clip", "these 2 images"]
    assert [re.search("of (.*?) \\(full", own)[1] for own, _ in remarks] == scales
    assert {last for _, last in remarks} == {"The preset tiny has random weights: this map means nothing."}


def test_relevance_has_each_frame_once(call, files, tmp_path, monkeypatch, saved):
    sheets = []
    monkeypatch.setattr("ppllava.relevance.save_png", lambda *arguments: sheets.append(arguments))
    options = ("--max-new-tokens", 1, "--frames", 20, "--relevance", tmp_path / "out.png")
    assert call("ask", "g.gif", QUESTION, "--model", saved, *options).exit_code == 0
    [(_, frames, times, _, _, remarks)] = sheets
    clip = read_video(files / "g.gif", 20)
    assert len(clip.frames) == 20
    known = sorted(set(clip.timestamps.tolist()))
    assert (times.tolist(), len(frames)) == (known, len(known))
    assert len(known) <= 12
    assert len(remarks) == 1  # its weights are those of a folder


def test_relevance_of_one_image_is_that_of_its_whole_view(call, files, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("ppllava.relevance.draw", lambda *arguments: drawn.append(arguments) or arguments[0])
    draw(call, "i.png", QUESTION, "--preset", "tiny", "--max-new-tokens", "1", "--relevance", tmp_path / "out.png")
    relevance = relevance_map({"type": "image", "image": Image.open(files / "i.png")})  # [views, 6, 6]
    assert len(relevance) > 1
    ((frames, drawn_map, limits),) = drawn
    np.testing.assert_array_equal(frames, np.asarray(Image.open(files / "i.png"))[None])
    np.testing.assert_allclose(drawn_map, relevance[:1], rtol=1e-4)
    assert limits[1] == drawn_map.max()


# The other commands, and the program


def test_presets(call):
    head, *rows = call("presets").stdout.splitlines()
    assert head.split("  ")[0] == "preset"
    assert [row.split()[0] for row in rows] == list(presets.NAMES)
    model, processor = presets.build("tiny")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in rows[0]
    assert rows[0].endswith(f" {processor.num_video_tokens(32)}")


def test_convert(call, monkeypatch):
    calls = []
    monkeypatch.setattr("ppllava.convert.convert_checkpoint", lambda *a, **k: calls.append((a, k)) or "a report")
    result = call("convert", "source", "target", "--base", "b", "--clip", "c", "--dtype", "bfloat16")
    assert (result.exit_code, result.stdout) == (0, "a report\n")
    ((paths, options),) = calls
    assert [str(path) for path in paths] == ["source", "target"]
    given = {name: value if name == "dtype" else value and str(value) for name, value in options.items()}
    folders = {"base": "b", "clip": "c", "adapter": None, "tokenizer": None, "guide_tokenizer": None}
    assert given == {**folders, "dtype": torch.bfloat16}
    call("convert", "source", "target")
    assert calls[1][1]["dtype"] is None


def test_help_has_the_exit_codes(call):
    text = " ".join(call("ask", "--help").stdout.split())
    for code, meaning in cli.MEANINGS.items():
        assert f"{code.value} {meaning}" in text
    assert set(cli.MEANINGS) == set(cli.Exit)


def start(files, *command):
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *command], cwd=files, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_as_a_program(files):
    program = start(files, "-m", "ppllava_command", "ask", "a.mp4", QUESTION, *QUICK, "--json")
    out, err = program.communicate(timeout=240)
    assert (program.returncode, err) == (0, RANDOM)
    assert json.loads(out)["answer"] == expected([video(files / "a.mp4")])


SLOW = """
import time, torch, ppllava_command
from ppllava import PPLlavaForConditionalGeneration

def generate(model, input_ids, streamer, **kwargs):
    streamer.put(input_ids)
    for token in streamer.tokenizer("Wait for " + 600 * "it ", add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
        time.sleep(0.1)

PPLlavaForConditionalGeneration.generate = generate
ppllava_command.main()
"""


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        (lambda program: program.send_signal(signal.SIGINT), 130, "ppllava: interrupted\n"),
        (lambda program: program.stdout.close(), 141, ""),
    ],
    ids=["interrupt", "close"],
)
def test_the_answer_is_cut_off(files, end, code, text):
    program = start(files, "-c", SLOW, "ask", "a.mp4", QUESTION, *QUICK)
    assert program.stdout.read(5) == "Wait "
    end(program)
    program.wait(timeout=240)
    assert (program.returncode, program.stderr.read()) == (code, RANDOM + text)
