"""Batch inference: what does not fit is halved, what is answered is let go."""

import gc
import warnings

import pytest
import torch
from batch_fixtures import ask, folder, made
from PIL import Image

import ppllava
from ppllava import BatchWarning, batching, packing, sources
from ppllava.packing import Item


def out_of_memory(model, patch, most):
    """`generate` fits so many rows."""
    calls, generate = [], model.generate

    def limited(input_ids, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate(input_ids=input_ids, **kwargs)

    patch.setattr(model, "generate", limited)
    return calls


def test_a_batch_too_large_is_halved_and_said_once(made, folder, monkeypatch):
    requests = [ask(folder / f"{n % 4}.mp4", "What?" * n, frames=4) for n in range(1, 20)]
    expected = list(ppllava.batch(*made, requests))
    calls = out_of_memory(made[0], monkeypatch, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(ppllava.batch(*made, requests)) == expected
    assert [str(w.message).partition(" with ")[0] for w in caught if w.category is BatchWarning] == [
        "generate ran out of memory"
    ]
    assert calls[:3] == [8, 4, 2]
    assert sum(count > 3 for count in calls) <= 3  # later batches do not try again


def test_what_does_not_fit_alone_is_an_error_of_its_own(made, folder, monkeypatch):
    generate = made[0].generate

    def limited(input_ids, **kwargs):
        if input_ids.shape[1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(made[0], "generate", limited)
    requests = [ask(folder / "0.mp4", "a" * (200 if n == 2 else n + 1), frames=4) for n in range(5)]
    with pytest.warns(BatchWarning):
        answers = list(ppllava.batch(*made, requests))
    assert ["error" in answer for answer in answers] == [False, False, True, False, False]
    assert "out of memory even alone" in answers[2]["error"]


def test_another_failure_of_a_batch_fails_alone(made, folder, monkeypatch):
    generate = made[0].generate

    def poisoned(input_ids, **kwargs):
        if (input_ids == made[1].tokenizer.convert_tokens_to_ids("X")).any():
            raise ValueError("poison")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(made[0], "generate", poisoned)
    requests = [ask(folder / "0.mp4", "X" if n == 3 else "Y" * n, frames=4) for n in range(1, 7)]
    answers = list(ppllava.batch(*made, requests))
    assert [answer.get("error") for answer in answers] == [None, None, "poison", None, None, None]


def test_the_vision_tower_takes_fewer_frames_where_they_do_not_fit(made, folder):
    model, processor = made
    request = ask(folder / "3.mp4", frames=20)
    [expected] = ppllava.batch(model, processor, [request])
    seen = []

    def limited(_, inputs):
        seen.append(len(inputs[0]))
        if len(inputs[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.vision_tower.register_forward_pre_hook(limited)
    with pytest.warns(BatchWarning, match="the vision tower ran out of memory with 20 frames at once") as caught:
        assert list(ppllava.batch(model, processor, [request])) == [expected]
    assert len(caught) == 1
    assert seen == [20, 10, 5, 5, 5, 5]
    assert model.config.vision_chunk is None  # as it was


def test_a_video_too_long_for_the_memory(made, folder):
    [answer] = ppllava.batch(*made, [ask(folder / "0.mp4", frames=1 << 20)], memory=64 << 20)
    message = "the features of 1048576 frames take 9,216.0 MiB, more than the 64.0 MiB of memory; ask for fewer frames"
    assert message in answer["error"]


@pytest.mark.parametrize("name", ["max_new_tokens", "memory", "workers"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_wrong_arguments_are_said_before_the_first_answer(made, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got {value}"):
        ppllava.batch(*made, [], **{name: value})


def test_nothing_of_what_is_answered_is_kept(made, folder, monkeypatch):
    held, generate = [], made[0].generate

    def watched(**kwargs):
        gc.collect()
        held.append(sum(isinstance(x, Item) and x.row is not None for x in gc.get_objects()))
        return generate(**kwargs)

    monkeypatch.setattr(made[0], "generate", watched)
    list(ppllava.batch(*made, [ask(folder / f"{n % 4}.mp4", "What?" * n, frames=2) for n in range(1, 25)]))
    assert held == [24, 16, 8]  # of a window, without those that are answered


def test_clips_that_wait_follow_a_smaller_chunk(made, folder):
    """They were decoded when more frames at once were expected."""
    seen = []

    def limited(_, inputs):
        seen.append(len(inputs[0]))
        if len(inputs[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    requests = [ask(folder / f"{n % 4}.mp4", "What?" * n, frames=14 + n) for n in range(1, 9)]
    expected = list(ppllava.batch(*made, requests))
    made[0].model.vision_tower.register_forward_pre_hook(limited)
    with pytest.warns(BatchWarning) as caught:
        assert list(ppllava.batch(*made, requests, workers=8)) == expected
    assert len(caught) == 1
    assert sum(count > 6 for count in seen) == 2  # of the first clip alone


def test_a_source_that_fits_in_no_chunk_leaves_the_others_as_they_were(made, folder, monkeypatch):
    model, processor = made
    encode, chunks = ppllava.encoding.encode_frames, []

    def limited(model, processor, frames):
        chunks.append((frames.count, model.config.vision_chunk))
        if frames.count == 19:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(model, processor, frames)

    monkeypatch.setattr(ppllava.sources, "encode_frames", limited)
    requests = [ask(folder / "0.mp4", frames=19), ask(folder / "1.mp4", frames=4)]
    with pytest.warns(BatchWarning):
        answers = list(ppllava.batch(model, processor, requests))
    assert "out of memory even alone" in answers[0]["error"]
    assert "answer" in answers[1]
    assert chunks == [(19, None), (19, 9), (19, 4), (19, 2), (19, 1), (4, None)]


def test_images_follow_a_smaller_chunk_too(made, folder):
    request = ask([folder / "i.png"] * 10)
    [expected] = ppllava.batch(*made, [request])

    def limited(_, inputs):
        if len(inputs[0]) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")

    made[0].model.vision_tower.register_forward_pre_hook(limited)
    with pytest.warns(BatchWarning):
        assert list(ppllava.batch(*made, [request])) == [expected]


def test_decoded_clips_are_not_copied_before_their_turn(made, monkeypatch):
    held, generate = [], made[0].generate

    def watched(**kwargs):
        gc.collect()
        held.append(sum(isinstance(x, sources.OpenedVideo) for x in gc.get_objects()))
        return generate(**kwargs)

    monkeypatch.setattr(made[0], "generate", watched)
    clip = [Image.new("RGB", (40, 30))] * 2
    requests = [{"id": n, "video": list(clip), "prompt": "a", "max_new_tokens": 1} for n in range(24)]
    assert all("answer" in answer for answer in ppllava.batch(*made, requests))
    assert held == [16, 8, 0]


def test_many_questions_about_one_clip_wait_without_their_tokens(made, folder, monkeypatch):
    held, seen, generate = [], [], made[0].generate

    def watched(**kwargs):
        gc.collect()
        held.append(sum(isinstance(x, Item) and x.row is not None for x in gc.get_objects()))
        return generate(**kwargs)

    monkeypatch.setattr(made[0], "generate", watched)
    made[0].model.vision_tower.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    requests = [ask(folder / "0.mp4", "What?" * n, frames=2) for n in range(1, 41)]
    assert all("answer" in answer for answer in ppllava.batch(*made, requests))
    assert held == [8] * 5
    assert seen == [2]


def test_a_static_cache_stays_within_the_memory(made, folder, monkeypatch):
    model, calls = made[0], []
    generate = model.generate

    def watched(input_ids, **kwargs):
        output = generate(input_ids=input_ids, **kwargs)
        calls.append((len(input_ids), getattr(model, batching.PREVIOUS_CACHE, 0)))
        return output

    monkeypatch.setattr(model, "generate", watched)
    requests = [ask(folder / "0.mp4", "a" * 1000, frames=2, max_new_tokens=3)]
    requests += [ask(folder / "0.mp4", "a" * n, frames=2, max_new_tokens=3) for n in range(1, 20)]
    memory = 1100 * packing.bytes_per_token(model.config.text_config, torch.float64)
    expected = list(ppllava.batch(*made, requests))
    calls.clear()
    static = {"cache_implementation": "static", "memory": memory}
    assert list(ppllava.batch(*made, requests, **static)) == expected
    assert all(count * length <= 1100 for count, length in calls)
    assert max(count for count, _ in calls) == 8
    lengths = [length for _, length in calls]
    assert len(set(lengths)) == 2  # one for the long prompt, one for all others
    assert list(ppllava.batch(*made, requests, **static)) == expected  # and again, after a short one


@pytest.mark.parametrize(("needed", "previous", "length"), [(10, 0, 10), (10, 19, 19), (10, 20, 10), (30, 20, 30)])
def test_a_static_cache_shrinks_by_half(needed, previous, length):
    assert packing.cache_length(needed, previous) == length
