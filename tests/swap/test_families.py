"""Each family compressed: against the model untouched, against the same by hand, in batches; and what stays."""

import copy
import gc

import by_hand
import families
import pytest
import torch
from close import assert_close
from families import CLIPS, QUESTIONS, WINDOWS

import ppllava
from benchmarks import gate

pytestmark = pytest.mark.parametrize("name", families.NAMES)


def ask(name, processor, clips=CLIPS, **kwargs):
    prompts = [families.prompt(name, question) for question in QUESTIONS[: len(clips)]]
    return processor(text=prompts, videos=list(clips), padding=True, return_tensors="pt", **kwargs)


def in_float64(model, seed=None):
    """A copy in float64; with a seed, each weight moved by up to the eps of float32, as tests/close.py does inputs."""
    model = copy.deepcopy(model).double()
    for weight in model.parameters() if seed is not None else ():
        weight.data = gate.nudged(weight.data.float(), seed)
    return model


def as_double(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False])
def test_a_window_of_one_changes_nothing(name, guided):
    model, processor = families.built(name)
    compressed, new = ppllava.compress(model, processor, kernel_size=1, guide=families.guide() if guided else None)
    same = CLIPS[:1] * 2  # stock processors of some take clips of one length
    inputs, stock = ask(name, new, same), ask(name, processor, same)
    assert torch.equal(inputs["input_ids"], stock["input_ids"])
    assert ("guide_input_ids" in inputs) == guided
    expected = model(**stock).logits
    exact, *nudged = [in_float64(model, seed)(**as_double(stock)).logits for seed in (None, 1, 2, 3)]
    assert_close("logits", compressed(**inputs).logits, [expected, *nudged], exact)


def tokens_by_hand(name, model, processor, guide, words, clips, window, own=False):
    weights = [None] * len(clips)
    grids = by_hand.token_grids(name, model, processor, clips)
    if guide is not None:
        for i, (clip, question) in enumerate(zip(clips, QUESTIONS)):
            frames = by_hand.pixels(name, processor, clip)
            relevance = by_hand.relevance(name, model, guide, words, question, frames, own)
            weights[i] = by_hand.on_grid(relevance, *grids[i][0][0].shape[1:3])
    return by_hand.pooled_tokens(grids, weights, **window)


def check_against_hand(name, model, processor, guide, words, window, own=False):
    compressed, new = ppllava.compress(model, processor, guide=guide and (guide, words), **window)
    clocks = [{"total_num_frames": len(clip), "fps": 1, "frames_indices": range(len(clip))} for clip in CLIPS]
    inputs = ask(name, new, **({"video_metadata": clocks} if name == "qwen2_5_vl" else {}))
    # What Qwen2.5-VL calls time: 4 positions a second, 2 frames of a second in a step, and the steps between windows.
    seconds = {"blocks": [2, 2], "overlap": [1, 1], "longer_than_a_clip": [4, 3], "adaptive": [4 / 3, 1.0]}
    steps = seconds[next(key for key, value in WINDOWS.items() if value == window)]
    pair, results = (model, guide), []
    doubles = [[one and in_float64(one, seed) for one in pair] for seed in (None, 1, 2, 3)]
    for one, other in (pair, *doubles):
        tokens = tokens_by_hand(name, one, processor, other, words, CLIPS, window, own)
        given = [4 * step * 2 for step in steps] if name == "qwen2_5_vl" else None
        results.append(by_hand.logits(name, one, inputs, tokens, given))
    eager, exact, *nudged = results
    assert_close("logits", compressed(**inputs).logits, [eager, *nudged], exact)
    return compressed, inputs


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_against_the_same_by_hand(name, window):
    model, processor = families.built(name)
    guide, words = families.guide("siglip" if window == "overlap" else "clip")
    check_against_hand(name, model, processor, guide, words, WINDOWS[window])


@torch.no_grad()
def test_the_plain_mean_by_hand(name):
    check_against_hand(name, *families.built(name), None, None, WINDOWS["blocks"])


# (T, H, W) in tokens of the 8 frames, what each step and each clip has besides, and the pooled (To, Ho, Wo).
COUNTS = {
    "llava_next_video": (4 * 2 * 2, 2 * 2 * 2),
    "llava_onevision": (4 * 2 * 2 + 1, 2 * 2 * 2 + 1),
    "video_llava": (4 * (2 * 2 + 1), 2 * (2 * 2 + 1)),
    "qwen2_5_vl": (2 * 2 * 2, 1 * 2 * 2),
    "qwen3_vl": (2 * 2 * 2, 1 * 2 * 2),
    "internvl": (4 * 2 * 2, 2 * 2 * 2),
}


def test_the_number_of_tokens(name):
    model, processor = families.built(name)
    _, new = ppllava.compress(model, processor, guide=None, **WINDOWS["blocks"])
    token = new.image_token_id if name == "internvl" else new.video_token_id
    assert tuple((ask(name, new)["input_ids"] == token).sum(1).tolist()) == COUNTS[name]


def answers(model, inputs, **kwargs):
    ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_for_clips_of_different_length(name, options):
    model, processor = families.built(name)
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), **WINDOWS["blocks"])
    together = answers(compressed, ask(name, new), **options)
    for i, clip in enumerate(CLIPS):
        prompt = families.prompt(name, QUESTIONS[i])
        alone = answers(compressed, new(text=prompt, videos=[clip], return_tensors="pt"), **options)
        assert together[i] == alone[0]
    assert together[0] != together[1]


@torch.no_grad()
def test_images_and_text_stay_as_they_are(name):
    model, processor = families.built(name)
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), **WINDOWS["blocks"])
    picture = families.clip(1, seed=3)[0]
    for kind, images in (("image", [picture]), (None, None)):
        text = families.prompt(name, "What is it?", kind)
        given = [one(images=images, text=text, return_tensors="pt") for one in (processor, new)]
        assert given[0].keys() == given[1].keys()
        assert all(torch.equal(given[0][key], given[1][key]) for key in given[0])
        assert torch.equal(model(**given[0]).logits, compressed(**given[1]).logits)
        assert answers(model, given[0]) == answers(compressed, given[1])


@torch.no_grad()
def test_an_image_and_a_video_in_one_prompt(name):
    """Its answer is that of a window of one for the video, whose tokens are then all there."""
    model, processor = families.built(name)
    both = families.prompt(name, "Compare.", "image") + families.prompt(name, "Compare.", "video")
    given = {"images": [families.clip(1, seed=3)[0]], "text": both, "videos": [CLIPS[0]], "return_tensors": "pt"}
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), kernel_size=1)
    expected = model(**processor(**given)).logits
    assert torch.allclose(compressed(**new(**given)).logits, expected, atol=1e-5)
    pooled, new = ppllava.compress(model, processor, guide=families.guide(), **WINDOWS["blocks"])
    inputs = new(**given)
    assert inputs["input_ids"].shape[1] < expected.shape[1]
    assert answers(pooled, inputs, num_beams=2) == answers(pooled, inputs, num_beams=2, use_cache=False)


@torch.no_grad()
def test_the_originals_stay_as_they_are(name):
    model, processor = families.build(name)
    before = ask(name, processor, CLIPS[:1])
    logits, texts = model(**before).logits, (repr(model), repr(processor), model.config.to_json_string())
    classes = [type(x) for x in (model, model.model, processor, processor.video_processor)]
    members = [dict(vars(c)) for kind in classes for c in kind.__mro__]
    attributes = [dict(vars(x)) for x in (model, model.model, processor)]
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), **WINDOWS["blocks"])
    answers(compressed, ask(name, new))
    compressed.generation_config.max_length = 7
    compressed.register_forward_hook(lambda *_: 1 / 0)
    compressed.model.extra = torch.nn.Identity()
    assert isinstance(compressed, type(model))
    assert isinstance(new, type(processor))
    assert {id(x) for x in model.parameters()} <= {id(x) for x in compressed.parameters()}
    del compressed, new
    gc.collect()
    assert [type(x) for x in (model, model.model, processor, processor.video_processor)] == classes
    assert [dict(vars(c)) for kind in classes for c in kind.__mro__] == members
    for x, expected in zip((model, model.model, processor), attributes):
        assert vars(x).keys() == expected.keys()
        assert all(vars(x)[key] is value for key, value in expected.items())
    after = ask(name, processor, CLIPS[:1])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(**after).logits, logits)
    assert (repr(model), repr(processor), model.config.to_json_string()) == texts
