"""The model against itself in every way transformers can run it."""

import re
from contextlib import contextmanager

import pytest
import torch
from tiny import NEW, alone, batch, clip, close, fresh, generate, prompt, tiny
from transformers import CLIPVisionModel, StaticCache

import ppllava
import ppllava_kernels
from ppllava import PPLlavaConfig, PPLlavaForConditionalGeneration, presets
from ppllava_kernels import modules, prompt_guided_pool3d, prompt_guided_project


@contextmanager
def counting(monkeypatch, model):
    """Counts of vision tower calls and op calls."""
    calls = {"tower": 0, "op": 0}

    def op(*args, **kwargs):
        calls["op"] += 1
        return prompt_guided_project(*args, **kwargs)

    def tower(*_):
        calls["tower"] += 1

    handle = model.model.vision_tower.register_forward_hook(tower)
    monkeypatch.setattr(modules, "prompt_guided_project", op)
    yield calls
    handle.remove()


# The parts


def test_only_needed_vision_layers_exist_and_run():
    model = tiny()[0].model
    whole = CLIPVisionModel(model.config.vision_config).eval()
    missing, unexpected = whole.load_state_dict(model.vision_tower.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(name.startswith(("encoder.layers.2.", "post_layernorm.")) for name in missing)
    pixels = batch(3)["pixel_values_videos"]
    expected = whole(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]  # [F, 36, 32]
    close(model.encode_frames(pixels, [3]).flatten(1, 2), expected, 1e-6)


def test_pooling_before_linear_2_is_pooling_after_it():
    model = tiny()[0].model
    inputs = batch(4)
    features = model.encode_frames(inputs["pixel_values_videos"], [4])  # [F, H, W, V]
    project, guide = model.multi_modal_projector, model.guide
    expected = prompt_guided_pool3d(
        project.linear_2(project.act(project.linear_1(features)))[None],  # [1, T, H, W, D]
        guide.embed_patches(features)[None],
        guide.embed_text(inputs["guide_input_ids"]),
        kernel_size=(2, 3, 3),
        logit_scale=guide.logit_scale.exp().item(),
        backend="reference",
    )
    actual = model.get_video_features(**inputs).pooler_output[0]
    close(actual, expected.flatten(0, -2), 1e-5)


def test_the_question_guides_the_pooling():
    model, processor = tiny()
    videos = [clip(4), clip(4)]
    inputs = processor(text=[prompt("x")] * 2, videos=videos, guide_text=["a dog", "the score on the board"])
    video = model.get_video_features(**inputs)
    assert [tuple(r.shape) for r in video.relevance] == [(4, 6, 6)] * 2
    close(torch.stack([r.sum() for r in video.relevance]), torch.ones(2), 1e-5)
    first, second = video.pooler_output
    assert (first - second).norm() > 0.05 * first.norm()


@pytest.mark.parametrize(("chunk", "calls"), [(None, 1), (3, 4), (20, 1)])
def test_vision_chunk(chunk, calls, monkeypatch):
    inputs = batch(8, 2)
    model = fresh(vision_chunk=chunk)
    model.load_state_dict(tiny()[0].state_dict())
    with counting(monkeypatch, model) as counts:
        actual = model.get_video_features(**inputs).pooler_output
    assert counts == {"tower": calls, "op": 1}
    for one, other in zip(actual, tiny()[0].get_video_features(**inputs).pooler_output):
        close(one, other, 1e-5)


def test_dense_clips_are_packed_clips():
    inputs = dict(batch(4, 4))
    expected = tiny()[0](**inputs).logits
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].unflatten(0, (2, 4))  # [B, T, 3, S, S]
    del inputs["video_frames"]
    assert torch.equal(tiny()[0](**inputs).logits, expected)


def test_output_size_is_a_token_budget_for_any_length():
    config = PPLlavaConfig(**{**presets.preset_config("tiny").to_dict(), "pooling_output_size": (2, 2, 2)})
    model, processor = PPLlavaForConditionalGeneration(config).eval(), presets.build_processor(config)
    inputs = batch(1, 5, 9, processor=processor)
    assert (inputs["input_ids"] == 3).sum(1).tolist() == [8, 8, 8]
    assert [len(video) for video in model.get_video_features(**inputs).pooler_output] == [8, 8, 8]
    assert model(**inputs).logits.isfinite().all()


# Running it

FREE = {"attention_mask": None}


@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_encodes_the_videos_once(arguments, monkeypatch):
    with counting(monkeypatch, tiny()[0]) as counts:
        generate(tiny()[0], batch(8, 5), **arguments)
    assert counts == {"tower": 1, "op": 1}


def test_greedy_is_repeated_full_forwards():
    inputs = alone(1, 8)
    arguments = dict(inputs)
    for _ in range(NEW):
        with torch.no_grad():
            token = tiny()[0](**arguments, use_cache=False).logits[:, -1, 3 + 1 :].argmax(-1, keepdim=True) + 3 + 1
        arguments["input_ids"] = torch.cat([arguments["input_ids"], token], 1)
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    expected = arguments["input_ids"][:, -NEW:].tolist()
    never = {"suppress_tokens": [0, 1, 2, 3]}
    assert generate(tiny()[0], inputs, **never) == expected
    assert generate(tiny()[0], inputs, cache_implementation="static", **never) == expected


def test_decoding_without_generate_counts_from_the_first_token():
    model, inputs = tiny()[0], batch(8, 5)  # padded on the left
    with torch.no_grad():
        out = model(**inputs)
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        one = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values).logits[:, -1]
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], token], 1), "attention_mask": mask}
        close(one, model(**whole).logits[:, -1], 1e-4)


@pytest.mark.parametrize("rest", [0, 1])
def test_decoding_without_generate_in_a_static_cache(rest):
    """The mask may be as long as the cache; what lies after the tokens so far does not count."""
    model, inputs = tiny()[0], alone(1, 8)
    start = inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1).long(), torch.full((1, 9), rest)], 1)
    cache = StaticCache(config=model.config.text_config, max_cache_len=start + 10)
    with torch.no_grad():
        expected = model(**{**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[9]])], 1)} | FREE)
        model(**{**inputs, "attention_mask": mask}, past_key_values=cache)
        one = model(input_ids=torch.tensor([[9]]), attention_mask=mask, past_key_values=cache)
    close(one.logits[:, -1], expected.logits[:, -1], 1e-4)


@pytest.mark.parametrize("length", [4, 8])
def test_prompt_lookup(length):
    inputs = alone(1, length)
    with pytest.raises(ValueError, match=re.escape("which copies <video>, pass suppress_tokens=[3]")):
        generate(tiny()[0], inputs, prompt_lookup_num_tokens=3)
    never = {"suppress_tokens": [3]}
    assert generate(tiny()[0], inputs, prompt_lookup_num_tokens=3, **never) == generate(tiny()[0], inputs, **never)


def test_beam_scores_are_those_of_full_forwards():
    inputs = batch(8, 5)
    start = inputs["input_ids"].shape[1]
    out = tiny()[0].generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        num_beams=3,
        num_return_sequences=2,
        return_dict_in_generate=True,
        output_scores=True,
        suppress_tokens=[3],
    )
    assert len({tuple(row) for row in out.sequences[:, start:].tolist()}) == 4
    for row, sequence in enumerate(out.sequences):
        single = alone(row // 2, (8, 5)[row // 2])
        single["input_ids"] = torch.cat([single["input_ids"], sequence[None, start:]], 1)
        single["attention_mask"] = torch.ones_like(single["input_ids"])
        with torch.no_grad():
            logits = tiny()[0](**single).logits[0, -NEW - 1 : -1]  # [NEW, vocabulary]
        expected = logits.log_softmax(-1).gather(1, sequence[start:, None]).sum() / NEW
        close(out.sequences_scores[row], expected, 1e-4)


@pytest.mark.parametrize("lengths", [(8, 5), (3, 10, 6), (4, 0), (0, 4, 0), (2, 2)])
def test_a_batch_is_each_prompt_alone(lengths, monkeypatch):
    model, inputs = tiny()[0], batch(*lengths)
    with torch.no_grad(), counting(monkeypatch, model) as counts:
        logits = model(**inputs).logits
    assert counts == {"tower": 1, "op": 1}
    ids = generate(model, inputs)
    for i, length in enumerate(lengths):
        single = alone(i, length)
        with torch.no_grad():
            expected = model(**single).logits[0]
        close(logits[i, -len(expected) :], expected, 1e-4)
        assert ids[i] == generate(model, single)[0]


def test_two_videos_in_one_prompt():
    model, processor = tiny()
    text = "USER: <video> or <video>? ASSISTANT:"
    inputs = processor(text=text, videos=[clip(4, 0), clip(6, 1)])
    assert inputs["video_frames"].tolist() == [4, 6]
    assert len(inputs["guide_input_ids"]) == 2
    logits = model(**inputs).logits
    other = model(**processor(text=text, videos=[clip(4, 0), clip(6, 2)])).logits
    placeholders = (inputs["input_ids"][0] == 3).nonzero().flatten()  # 8 of the first video, 12 of the second
    changed = (logits - other).abs().amax(-1)[0] > 1e-6  # [S]
    assert int(changed.nonzero()[0]) == placeholders[8]


def test_text_only_is_the_language_model():
    model, processor = tiny()
    inputs = processor(text=["Hello", "What is the time now?"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model.model.language_model(**inputs, position_ids=positions).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.tensor(generate(model, inputs)).shape == (2, NEW)


def test_inputs_embeds_and_encoded_videos():
    model, inputs = tiny()[0], batch(4, 6)
    expected = model(**inputs).logits
    video = {"video": model.get_video_features(**inputs)}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=video).logits, expected)
    assert torch.equal(model(inputs_embeds=embeds, attention_mask=mask, mm_encoder_outputs=video).logits, expected)
    last = model(input_ids=ids, attention_mask=mask, mm_encoder_outputs=video, logits_to_keep=2).logits
    close(last, expected[:, -2:], 1e-5)


def test_compiles_as_one_graph():
    model, inputs = tiny()[0], dict(batch(2, 2))
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].unflatten(0, (2, 2))
    del inputs["video_frames"]
    with torch.no_grad():
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        close(compiled(**inputs).logits, model(**inputs).logits, 1e-5)


def test_loss_reaches_every_part():
    model, inputs = fresh(), batch(4, 5)
    labels = torch.where(inputs["attention_mask"].bool() & (inputs["input_ids"] != 3), inputs["input_ids"], -100)
    out = model(**inputs, labels=labels)
    shifted, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    close(out.loss, torch.nn.functional.cross_entropy(shifted, targets, ignore_index=-100), 1e-5)
    out.loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {"model.image_newline"}  # only images have one
    zero = {name for name, parameter in model.named_parameters() if name not in without and not parameter.grad.any()}
    assert not zero
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bfloat16():
    model, _ = presets.build("tiny", dtype=torch.bfloat16)
    inputs = batch(4, 5).to(torch.bfloat16)
    assert inputs["pixel_values_videos"].dtype == torch.bfloat16
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    expected = tiny()[0](**batch(4, 5)).logits[:, -1]
    assert (logits[:, -1].float() - expected).norm() < 0.2 * expected.norm()
    assert torch.tensor(generate(model, inputs)).shape == (2, NEW)


def test_the_scale_stays_in_float32():
    for model in (presets.build("tiny", dtype=torch.bfloat16)[0], fresh().to(torch.bfloat16), fresh().half()):
        assert model.model.guide.logit_scale.dtype == torch.float32
        assert model.model.guide.scale.item() == pytest.approx(100, abs=0.1)
        assert {p.dtype for p in model.parameters()} != {torch.float32}
    assert fresh().double().model.guide.scale.dtype == torch.float64


def test_attention_implementation_reaches_every_part():
    model = fresh()
    model.set_attn_implementation({"vision_config": "eager", "guide_config": "sdpa", "text_config": "eager"})
    towers = (model.model.vision_tower, model.model.guide.text_model, model.model.language_model)
    assert [tower.config._attn_implementation for tower in towers] == ["eager", "sdpa", "eager"]
    model.load_state_dict(tiny()[0].state_dict())
    close(model(**alone(0, 4)).logits, tiny()[0](**alone(0, 4)).logits, 1e-4)


def test_pooling_temperature_is_not_the_sampling_temperature():
    assert tiny()[0].generation_config.temperature in (None, 1.0)


def test_version():
    assert ppllava.__version__ == ppllava_kernels.__version__
