"""Batch inference: the answers of `generate` for one request after the other, packed, encoded once, failing alone."""

from collections import UserDict

import numpy as np
import pytest
import torch
from batch_fixtures import NEW, alone, ask, folder, made, watch
from PIL import Image

import ppllava
from ppllava import EncodedVideo, batching, packing, video
from ppllava.console import is_fatal, is_memory


def mixed(folder):
    return [
        ask(folder / "0.mp4", frames=4),
        ask(folder / "i.png"),
        ask(folder / "3.mp4", "Who wins, and why does nobody stop it?", frames=13),
        ask([folder / "i.png", folder / "j.jpg"], max_new_tokens=3),
        ask(folder / "1.mp4", fps=5.0, start=0.3, end=1.2),
        ask(folder / "0.mp4", "And then?", frames=4),
        ask(folder / "j.jpg", "A dog?"),
        ask(folder / "2.mp4", max_new_tokens=1),
        ask(folder / "0.mp4", "And then?", frames=5),
    ]


def test_answers_are_those_of_generate(made, folder):
    requests = mixed(folder)
    answers = list(ppllava.batch(*made, requests))
    assert answers == [{"id": request["id"], "answer": alone(made, request)} for request in requests]


def test_one_request_in_no_list(made):
    with pytest.raises(TypeError) as error:
        ppllava.batch(*made, {"id": 1, "prompt": "What happens?"})
    assert str(error.value) == "requests must be several requests, got one mapping; pass a list of them, [request]"


def test_many_share_a_batch_and_like_lengths_do(made, folder, monkeypatch):
    calls = watch(monkeypatch, made[0])
    requests = [ask(folder / f"{n % 4}.mp4", "What " * (1 + 7 * n % 23), frames=2 + 5 * n % 17) for n in range(24)]
    answers = list(ppllava.batch(*made, requests))
    assert [answer["id"] for answer in answers] == [request["id"] for request in requests]
    assert [count for count, *_ in calls] == [8, 8, 8]
    lengths = [length for _, length, _ in calls]
    assert lengths == sorted(lengths, reverse=True)  # the largest first: what does not fit shows at once
    padded = sum(count * length for count, length, _ in calls)
    calls.clear()
    for request in requests:
        list(ppllava.batch(*made, [request]))
    needed = sum(length for _, length, _ in calls)
    by_order = sum(8 * max(length for _, length, _ in calls[n : n + 8]) for n in range(0, 24, 8))
    assert 0 <= padded - needed < (by_order - needed) / 2


def test_the_budget_bounds_a_batch(made, folder, monkeypatch):
    calls = watch(monkeypatch, made[0])
    requests = [ask(folder / f"{n % 4}.mp4", "What " * (n + 1), frames=2 + n) for n in range(9)]
    expected = list(ppllava.batch(*made, requests))
    calls.clear()
    token = packing.bytes_per_token(made[0].config.text_config, torch.float64)
    assert list(ppllava.batch(*made, requests, memory=200 * token)) == expected
    assert len(calls) > 3
    assert all(count == 1 or count * (length + new) <= 200 for count, length, new in calls)
    assert any(count > 1 for count, *_ in calls)


def test_a_clip_is_encoded_once_for_all_questions_about_it(made, folder):
    seen = []
    made[0].model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    questions = ["What?", "Who?", "What happens after that, and who is to blame?"]
    requests = [ask(folder / f"{n}.mp4", question, frames=4) for question in questions for n in (0, 1)]
    requests += [ask(folder / "0.mp4", "Other frames?", frames=6)] + [
        ask(folder / "1.mp4", "Why?" * n) for n in (1, 30)
    ]
    list(ppllava.batch(*made, requests))
    assert sum(seen) == 4 + 4 + 6 + 29  # the default 32 of a clip of 30 frames: 29 of them, some twice


def test_each_fails_alone(made, folder):
    good = ask(folder / "0.mp4", frames=4)
    bad = [
        (ask(folder / "none.mp4"), "there is no such file"),
        (ask(folder / "text.mp4"), "FFmpeg finds no video in it"),
        (ask(folder / "0.mp4", start=50.0), "0.mp4: start=50.0 is after the end of the clip"),
        (ask(folder / "none.png"), "there is no such image"),
        (ask(folder / "0.mp4", frames=5, fps=1.0), "frames and fps exclude each other"),
        (ask(folder / "0.mp4", colour="red"), "unknown keys colour"),
        ({"id": 7}, "prompt must be text, got none"),
        ("nonsense", "a request must be an object"),
        (ask(folder / "0.mp4", frames=4, max_new_tokens=100_000), "must fit into the 2048 of the model"),
        (ask(folder / "0.mp4", "Why? " * 3000, frames=4), "must fit into the 2048 of the model"),
    ]
    requests = [good, *(request for request, _ in bad), good]
    answers = list(ppllava.batch(*made, requests))
    expected = alone(made, good)
    assert answers[0]["answer"] == answers[-1]["answer"] == expected
    for (request, message), answer in zip(bad, answers[1:-1]):
        assert answer.keys() == {"id", "error"}
        assert message in answer["error"]
        assert answer["id"] == (request["id"] if isinstance(request, dict) else None)


def test_damage_that_shows_while_decoding_fails_alone(made, folder, monkeypatch):
    decode = video.PyAVReader._decode
    broken = str(folder / "1.mp4")
    monkeypatch.setattr(
        video.PyAVReader, "_decode", lambda self, *args: iter(()) if self.path == broken else decode(self, *args)
    )
    requests = [ask(folder / f"{n}.mp4", question, frames=4) for question in ("a?", "b?") for n in range(3)]
    answers = list(ppllava.batch(*made, requests))
    assert ["error" in answer for answer in answers] == [False, True, False] * 2
    assert "cannot be decoded" in answers[1]["error"]


def test_decoded_media_and_encoded_videos(made, folder):
    model, processor = made
    clip = video.read_video(folder / "0.mp4", num_frames=4)
    encoded = ppllava.encode_video(model, processor, folder / "0.mp4", num_frames=4)
    image = Image.open(folder / "i.png")
    media = [
        ("video", clip),
        ("video", clip.frames),
        ("video", encoded),
        ("image", image),
        ("image", np.asarray(image)),
    ]
    requests = [{"id": n, kind: x, "prompt": "What is it?", "max_new_tokens": NEW} for n, (kind, x) in enumerate(media)]
    answers = [answer["answer"] for answer in ppllava.batch(model, processor, requests)]
    files = [ask(folder / "0.mp4", frames=4), ask(folder / "i.png")]
    expected = [alone(made, request) for request in files]
    assert answers == [expected[0]] * 3 + [expected[1]] * 2


def test_the_context_bounds_an_answer_that_names_no_length(made, folder, monkeypatch):
    calls = watch(monkeypatch, made[0])
    request = ask(folder / "0.mp4", "a" * 1900, frames=4)
    del request["max_new_tokens"]
    [answer] = ppllava.batch(*made, [request])
    [(_, length, new)] = calls
    assert "answer" in answer
    assert length + new == 2048
    calls.clear()
    [_] = ppllava.batch(*made, [{**request, "prompt": "a"}], max_new_tokens=9)
    assert calls[0][2] == 9


def test_generate_options_arrive(made, folder):
    request = ask(folder / "0.mp4", frames=4)
    [expected] = ppllava.batch(*made, [request])
    assert list(ppllava.batch(*made, [request], cache_implementation="static")) == [expected]
    torch.manual_seed(0)
    [sampled] = ppllava.batch(*made, [request], do_sample=True, temperature=50.0)
    assert sampled != expected


# ---- what the answers must not depend on


def test_a_template_that_writes_the_first_token(made, folder):
    made[1].chat_template = "{{ bos_token }}" + made[1].chat_template
    request = ask(folder / "0.mp4", frames=4)
    assert list(ppllava.batch(*made, [request])) == [{"id": request["id"], "answer": alone(made, request)}]


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"forced_eos_token_id": 2}, {}])
def test_the_length_of_other_answers(made, folder, options, monkeypatch):
    requests = [ask(folder / f"{n}.mp4", "What?" * n, frames=4, max_new_tokens=3 + 7 * n) for n in range(4)]
    together = list(ppllava.batch(*made, requests, **options))
    assert together == [answer for request in requests for answer in ppllava.batch(*made, [request], **options)]


def test_long_answers_do_not_hold_up_short_ones_nor_pass_the_context(made, folder, monkeypatch):
    calls = watch(monkeypatch, made[0])
    long = [ask(folder / "0.mp4", "a" * 1800 + str(n), frames=4, max_new_tokens=2) for n in range(2)]
    short = [ask(folder / "0.mp4", f"a{n}", frames=4, max_new_tokens=200) for n in range(2)]
    list(ppllava.batch(*made, [*long, *short]))
    assert [(count, new) for count, _, new in calls] == [(2, 200), (2, 2)]
    calls.clear()
    mixed = [ask(folder / "0.mp4", "a" * n, frames=4, max_new_tokens=new) for n, new in ((1930, 70), (10, 120))]
    list(ppllava.batch(*made, mixed))  # 2,048 positions
    assert [count for count, *_ in calls] == [1, 1]


def test_images_that_pillow_has_only_opened_are_shared(made, folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    image = Image.open(tmp_path / "large.png")
    lists = [[image] + [folder / "j.jpg"] * n for n in range(1, 7)]
    requests = [{"id": n, "images": x, "prompt": "a", "max_new_tokens": 1} for n, x in enumerate(lists)]
    assert all("answer" in answer for answer in ppllava.batch(*made, requests, workers=4))


def test_a_clip_is_the_same_however_it_is_named(made, folder):
    seen = []
    made[0].model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    other = folder / ".." / folder.name / "0.mp4"
    list(ppllava.batch(*made, [ask(folder / "0.mp4"), ask(other, "a"), ask(str(other), frames=made[1].num_frames)]))
    assert len(seen) == 1


@pytest.mark.parametrize(
    "options",
    [{"num_return_sequences": 2}, {"return_dict_in_generate": True}, {"max_new_token": 3}, {"max_length": 9}],
    ids=lambda options: next(iter(options)),
)
def test_options_without_one_answer_for_each(made, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be an option of generate that gives one text"):
        ppllava.batch(*made, [], **options)


def test_a_model_and_a_processor_that_pool_differently(made):
    made[0].config.pooling_max_tokens = 4
    with pytest.raises(ValueError, match="model and processor must pool alike"):
        ppllava.batch(*made, [])


@pytest.mark.parametrize(
    ("text", "memory", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("CUDA error: out of memory", True, False),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True, False),
        ("[enforce fail] DefaultCPUAllocator: not enough memory", True, False),
        ("a shape is wrong", False, False),
    ],
)
def test_errors_that_end_a_job(made, folder, monkeypatch, text, memory, fatal):
    assert (is_memory(RuntimeError(text)), is_fatal(RuntimeError(text))) == (memory, fatal)

    def fail(**kwargs):
        raise RuntimeError(text)

    monkeypatch.setattr(made[0], "generate", fail)
    answers = ppllava.batch(*made, [ask(folder / "0.mp4", frames=2)])
    if fatal:
        with pytest.raises(RuntimeError, match=text):
            list(answers)
    else:
        [answer] = answers
        assert ("out of memory even alone" in answer["error"]) == memory


def test_ids_of_what_is_refused(made):
    given = [UserDict(id="y", prompt=""), {"id": True}, {"id": 3}, {"id": 4, "video": ["a.mp4"], "prompt": "a"}]
    given.append({"id": 5, "images": [None], "prompt": "a"})
    answers = list(ppllava.batch(*made, given))
    assert [answer["id"] for answer in answers] == ["y", None, 3, 4, 5]
    assert "video must be the path of a file" in answers[3]["error"]
    assert "images must be the path of a file, got none" in answers[4]["error"]


def test_encoded_videos_are_equal_as_objects(made):
    one = EncodedVideo(torch.zeros(1, 6, 6, 32))
    assert one == one
    assert one != EncodedVideo(torch.zeros(1, 6, 6, 32))
    assert len({one}) == 1


# ---- going on


def test_the_others_are_computed_as_in_one_go(made, folder, monkeypatch):
    requests = [ask(folder / f"{n % 4}.mp4", "What?" * (n % 5 + 1) + str(n), frames=2 + n % 3) for n in range(20)]
    calls = watch(monkeypatch, made[0])
    job = batching.BatchJob(*made)
    whole = {outcome.index: outcome for outcome in job.run(requests)}
    shapes = list(calls)
    assert sorted(whole) == list(range(20))
    done = {*list(whole)[9:]}  # all but the first batch and one of the second
    calls.clear()
    rest = {outcome.index: outcome for outcome in job.run(requests, done)}
    assert rest == {n: outcome for n, outcome in whole.items() if n not in done}
    assert set(calls) <= set(shapes)
    assert len(calls) < len(shapes)
    assert list(job.run(requests, range(20))) == []


def test_answers_come_while_others_are_computed(made, folder, monkeypatch):
    monkeypatch.setattr(packing.windows, "__defaults__", (2, None))
    calls = watch(monkeypatch, made[0])
    answers = ppllava.batch(*made, [ask(folder / f"{n}.mp4", frames=2) for n in range(4)])
    next(answers)
    assert len(calls) == 1
    assert len(list(answers)) == 3
