"""generate() with images and videos: every mode gives the same tokens, and towers run once."""

from functools import cache
from threading import Thread

import pytest
import torch
from test_images import TEXTS, mixed
from tiny import CHUNKS
from transformers import GenerationConfig, TextIteratorStreamer

from ppllava import modeling_ppllava, presets
from ppllava_kernels import modules

NEW = 6
# Without a cache every step is a whole prompt, in which a generated placeholder would stand for an image too many.
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "suppress_tokens": [3, 4]}


@cache
def built(name="tiny-btadapter"):
    return presets.build(name)


@pytest.fixture
def counts(monkeypatch):
    """How often towers and ops run."""
    model, calls = built()[0], {"vision": 0, "guide": 0, "op": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    op = modules.prompt_guided_project

    def counted(*args, **kwargs):
        calls["op"] += 1
        return op(*args, **kwargs)

    monkeypatch.setattr(modules, "prompt_guided_project", counted)
    handles = [
        model.model.vision_tower.register_forward_hook(count("vision")),
        model.model.guide.text_model.register_forward_hook(count("guide")),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}]
    + [{"prefill_chunk_size": 7}] * CHUNKS,
)
def test_towers_run_once_for_images_and_videos(options, counts):
    model, processor = built()
    model.generate(**mixed(processor), **GREEDY, **options)
    # Views and list images have one window; so has the clip of one frame. The clip of five frames has another.
    assert counts == {"vision": 1, "guide": 1, "op": 2}


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}]
    + [{"prefill_chunk_size": 7}, {"prefill_chunk_size": 1000}] * CHUNKS,
)
@pytest.mark.parametrize("name", ["tiny-btadapter", "tiny-qwen2"])
def test_every_mode_generates_the_same(name, options):
    model, processor = built(name)
    inputs = mixed(processor)
    assert torch.equal(model.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_chunks_before_5_23_are_an_error(where, monkeypatch):
    monkeypatch.setattr(modeling_ppllava.transformers, "__version__", "5.22.1")
    model, processor = built()
    config = GenerationConfig(prefill_chunk_size=7)
    options = {"argument": {"prefill_chunk_size": 7}, "generation_config": {"generation_config": config}}.get(where, {})
    if where == "model":
        monkeypatch.setattr(model, "generation_config", config)
    with pytest.raises(ValueError, match=r"^prefill_chunk_size with images or videos needs transformers 5\.23, got 5"):
        model.generate(**mixed(processor), **options)


def test_beams_of_a_batch_are_those_of_each_prompt():
    model, processor = built()
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    ids = model.generate(**mixed(processor), **options)[:, -NEW:]
    for i in range(len(TEXTS)):
        assert torch.equal(model.generate(**mixed(processor, only=i), **options)[:, -NEW:], ids[2 * i : 2 * i + 2])


def test_sampling_follows_the_seed():
    model, processor = built()
    inputs, options = mixed(processor), {**GREEDY, "do_sample": True, "temperature": 2.0}

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    # The most likely token only: greedy.
    assert torch.equal(model.generate(**inputs, **options, top_k=1), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("only", range(len(TEXTS)))
def test_streaming(only):
    model, processor = built()
    inputs = mixed(processor, only=only)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=model.generate, kwargs={**inputs, **GREEDY, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    ids = model.generate(**inputs, **GREEDY)[0, -NEW:]
    assert "".join(pieces) == processor.decode(ids, skip_special_tokens=True)


def test_encoded_before():
    model, processor = built()
    inputs = mixed(processor)
    names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
    features = model.get_media_features(**{name: inputs[name] for name in names})
    rest = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**rest, **GREEDY, mm_encoder_outputs=features), expected)
    model.generate(**rest, **GREEDY, mm_encoder_outputs=features, num_beams=3)
    assert torch.equal(model.generate(**rest, **GREEDY, mm_encoder_outputs=features), expected)  # beams change nothing
    with pytest.raises(ValueError, match=r"^pixel_values and mm_encoder_outputs\['image'\] are the same images twice"):
        model.generate(**inputs, **GREEDY, mm_encoder_outputs=features)


def test_a_ppllava_does_not_assist():
    model, processor = built()
    inputs = mixed(processor, only=1)
    with pytest.raises(ValueError, match=r"^assistant_model must be a language model, got a PPLLaVA, "):
        model.generate(**inputs, **GREEDY, assistant_model=model)
    assisted = model.generate(**inputs, **GREEDY, assistant_model=model.model.language_model)
    assert torch.equal(assisted, model.generate(**inputs, **GREEDY))


def test_relevance_of_every_medium():
    model, processor = built()
    inputs = mixed(processor)
    names = [name for name in inputs if name not in ("input_ids", "attention_mask")]
    features = model.get_media_features(**{name: inputs[name] for name in names})
    shapes = {kind: [tuple(x.shape) for x in out.relevance] for kind, out in features.items()}
    views = int(inputs["image_views"][0])
    assert shapes == {"image": [(views, 6, 6), (2, 6, 6), (2, 6, 6)], "video": [(5, 6, 6), (1, 6, 6)]}
    for out in features.values():
        for relevance in out.relevance:
            assert relevance.sum().item() == pytest.approx(1, abs=1e-5)
