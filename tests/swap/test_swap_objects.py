"""Compressed objects as objects of transformers: gradients, dtypes, saving, pickling, offloading, compilation."""

import copy
import pickle

import accelerate
import families
import pytest
import torch
import transformers
from close import assert_close
from families import BLOCKS, family
from safetensors.torch import load_file, load_model
from test_families import answers, as_double, ask, in_float64

import ppllava

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


@family()
def test_gradients_reach_values_and_guide(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    # A relevance of one part in 500 is flat where windows are as sharp as 0.01 makes them.
    compressed, new = ppllava.compress(model, processor, guide=(guide, words), temperature=1e-4, **BLOCKS)
    inputs = ask(name, new)
    compressed.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    vision = next(x for x in model.named_parameters() if "patch_embed" in x[0] and x[0].endswith("weight"))
    parameters = [
        vision,
        *((key, x) for key, x in guide.named_parameters() if key == "logit_scale"),
        ("text", guide.text_model.embeddings.token_embedding.weight),
        ("patches", guide.visual_projection.weight),
        ("tower", guide.vision_model.embeddings.patch_embedding.weight),
    ]
    for key, parameter in parameters:
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@torch.no_grad()
@family(("llava_next_video", "qwen3_vl", "internvl"))
def test_bfloat16(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    compressed, new = ppllava.compress(model.bfloat16(), processor, guide=(guide.bfloat16(), words), **BLOCKS)
    assert compressed(**ask(name, new)).logits.dtype == torch.bfloat16
    answers(compressed, ask(name, new))


@torch.no_grad()
@pytest.mark.gpu
@family()
def test_on_a_gpu(name):
    model, processor = families.build(name)
    guide, words = families.guide()
    compressed, new = ppllava.compress(model, processor, guide=(guide, words), **BLOCKS)
    inputs = ask(name, new)
    here, doubled = compressed(**inputs).logits, as_double(inputs)
    exact, *nudged = [in_float64(compressed, seed)(**doubled).logits for seed in (None, 1, 2, 3)]
    there = compressed.cuda()(**inputs.to("cuda")).logits
    assert_close("logits", there.cpu(), [here, *nudged], exact)
    answers(compressed, inputs, cache_implementation="static")


@torch.no_grad()
@family()
def test_the_base_model_takes_the_inputs_too(name):
    """As trainers with a fused head call it."""
    compressed, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    inputs = ask(name, new)
    hidden = compressed.base_model(**inputs).last_hidden_state
    assert torch.equal(compressed.lm_head(hidden), compressed(**inputs).logits)


@family(("llava_next_video", "internvl"))
def test_saving(name, tmp_path):
    model, processor = families.build(name)
    compressed, new = ppllava.compress(model, processor, guide=families.guide(), **BLOCKS)
    compressed.set_output_embeddings(torch.nn.Linear(48, compressed.lm_head.out_features, bias=False))
    compressed.generation_config.max_length = 77
    compressed.prompt_guide.requires_grad_(False)
    new.chat_template = "{{ messages }}"
    expected = compressed(**ask(name, new)).logits
    compressed.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.architectures == [type(model).__name__]
    assert loaded.generation_config.max_length == 77
    assert type(processor).from_pretrained(tmp_path).chat_template == new.chat_template
    assert processor.chat_template is None
    again, words = families.guide()
    with torch.no_grad():
        again.visual_projection.weight.zero_()
    new = type(processor).from_pretrained(tmp_path)
    compressed, new = ppllava.compress(loaded, new, guide=(again, words), **BLOCKS)
    load_model(compressed.prompt_guide, tmp_path / "guide.safetensors")
    torch.testing.assert_close(compressed(**ask(name, new)).logits, expected)


@pytest.mark.parametrize("own", [False, True])
def test_saving_as_trainer_does(tmp_path, own):
    """It passes a state, and reads the model's file again."""
    model, processor = families.build("llava_onevision")
    guide = families.guide("siglip", model.model.vision_tower if own else None)
    compressed, _ = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    state = {key: x + 1 for key, x in compressed.state_dict().items()}
    compressed.save_pretrained(tmp_path, state_dict=state)
    guides = {key.removeprefix("model.prompt_guide."): x for key, x in state.items() if "prompt_guide" in key}
    guides = {key: x for key, x in guides.items() if not key.startswith(("tower.post_layernorm", "tower.head"))}
    saved = load_file(tmp_path / "guide.safetensors")
    assert saved.keys() == guides.keys()
    assert all(torch.equal(saved[key], guides[key]) for key in saved)
    saved = load_file(tmp_path / "model.safetensors")
    assert guides.keys() == {key.removeprefix("model.prompt_guide.") for key in saved if "prompt_guide" in key}
    compressed.load_state_dict(saved, strict=False)
    now = compressed.prompt_guide.state_dict()
    assert all(torch.equal(now[key], guides[key]) for key in guides)
    _, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert all(key.startswith("model.prompt_guide.") for key in report["unexpected_keys"])


@torch.no_grad()
@family()
def test_a_checkpoint_by_the_names_of_the_hub(tmp_path, name):
    """Which Trainer reads back with load_state_dict, a shard at a time; all weights are those that were saved."""
    trained, _ = ppllava.compress(*families.build(name), guide=families.guide(), **BLOCKS)
    for weight in trained.parameters():
        weight.add_(1)
    trained.save_pretrained(tmp_path, max_shard_size="30KB")
    shards = [load_file(file) for file in sorted(tmp_path.glob("model-*.safetensors"))]
    assert len(shards) > 1
    resumed, _ = ppllava.compress(*families.build(name), guide=families.guide(), **BLOCKS)
    for shard in shards:
        assert not resumed.load_state_dict(shard, strict=False).unexpected_keys
    now, expected = resumed.state_dict(), trained.state_dict()
    assert all(torch.equal(now[key], expected[key]) for key in expected)
    message = r"^state_dict must have weights of this \w+ alone, got 1 others, first 'a\.b'; load the checkpoint with"
    with pytest.raises(ValueError, match=message):
        resumed.load_state_dict({**shards[0], "a.b": torch.zeros(1)}, strict=False)


@pytest.mark.parametrize(("name", "kind"), [("qwen3_vl", "clip"), ("llava_next_video", "siglip")])
def test_trainer_resumes_with_the_guide(tmp_path, name, kind):
    """Of Qwen3-VL, whose weights keep their names, and of a family whose weights have others in a checkpoint."""

    def train(resume: bool):
        compressed, new = ppllava.compress(*families.build(name), guide=families.guide(kind), **BLOCKS)
        row = dict(ask(name, new))
        options = {"max_steps": 1, "save_steps": 1, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
        trainer = transformers.Trainer(
            compressed,
            transformers.TrainingArguments(tmp_path, remove_unused_columns=False, disable_tqdm=True, **options),
            train_dataset=[0],
            data_collator=lambda _: {**row, "labels": row["input_ids"]},
        )
        before = copy.deepcopy(compressed.state_dict())
        trainer.train(resume_from_checkpoint=resume)
        return before, compressed.state_dict()

    before, trained = train(False)
    _, resumed = train(True)  # from the last of the steps
    guides = [key for key in trained if "prompt_guide" in key]
    assert any(not torch.equal(before[key], trained[key]) for key in guides)
    assert all(torch.equal(resumed[key], trained[key]) for key in trained)


@torch.no_grad()
@family(("video_llava", "qwen3_vl"))
def test_pickling(name):
    compressed, new = ppllava.compress(*families.build(name), guide=families.guide(), **BLOCKS)
    inputs = ask(name, new)
    again = pickle.loads(pickle.dumps(new))
    assert all(torch.equal(x, inputs[key]) for key, x in ask(name, again).items())
    if VERSION >= (5, 23):  # before, models of transformers themselves cannot
        assert torch.equal(pickle.loads(pickle.dumps(compressed))(**inputs).logits, compressed(**inputs).logits)


@family(("video_llava", "qwen3_vl"))
def test_classes_of_compressed_objects_load_nothing(name, tmp_path):
    for new in ppllava.compress(*families.built(name), guide=None, **BLOCKS):
        with pytest.raises(
            TypeError, match=r"Compressed\w+ must be made by ppllava\.compress; load a \w+ of transformers"
        ):
            type(new).from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_an_offloaded_model(own):
    model, processor = families.build("llava_next_video")
    guide = families.guide("clip", model.model.vision_tower if own else None)
    expected, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    inputs = ask("llava_next_video", new)
    logits = expected(**inputs).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.lm_head.weight.is_meta
    compressed, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    assert (compressed.prompt_guide.tower is None) == own
    assert torch.equal(compressed(**inputs).logits, logits)
    assert answers(compressed, inputs) == answers(expected, inputs)


@torch.no_grad()
def test_a_compiled_model():
    """What was compiled of the original runs the original."""
    model, processor = families.build("qwen2_5_vl")
    guide = families.guide()
    expected, new = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    inputs = ask("qwen2_5_vl", new)
    model.compile(backend="eager")
    model.model.compile(backend="eager")
    model._compiled_call = model._last_compile_config = None  # as generate leaves them
    compressed, _ = ppllava.compress(model, processor, guide=guide, **BLOCKS)
    for one in (compressed, compressed.model):
        assert not {"_compiled_call_impl", "_compiled_call", "_last_compile_config"} & vars(one).keys()
    assert torch.equal(compressed(**inputs).logits, expected(**inputs).logits)
    assert model._compiled_call_impl is not None


def test_a_model_with_a_forward_of_its_own():
    model, processor = families.build("internvl")
    model.forward = model.forward
    message = "model must have the forward of its class, got a InternVLForConditionalGeneration with one of its own"
    with pytest.raises(ValueError, match=message):
        ppllava.compress(model, processor, guide=None, **BLOCKS)


@torch.no_grad()
def test_a_guide_by_name_for_an_offloaded_model(tmp_path):
    guide, words = families.guide()
    guide.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model, processor = families.build("qwen2_5_vl")
    expected, new = ppllava.compress(model, processor, guide=tmp_path, **BLOCKS)
    logits = expected(**ask("qwen2_5_vl", new)).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    compressed, new = ppllava.compress(model, processor, guide=str(tmp_path), **BLOCKS)
    assert torch.equal(compressed(**ask("qwen2_5_vl", new)).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "other"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_a_guide_in_another_dtype(dtype, other):
    model, processor = families.build("llava_onevision")
    guide, words = families.guide()
    compressed, new = ppllava.compress(model.to(dtype), processor, guide=(guide.to(other), words), **BLOCKS)
    inputs = ask("llava_onevision", new)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    assert compressed(**inputs).logits.dtype == dtype


@torch.no_grad()
def test_arguments_by_position():
    model, processor = families.built("qwen2_5_vl")
    compressed, new = ppllava.compress(model, processor, guide=None, **BLOCKS)
    inputs = ask("qwen2_5_vl", new)
    ids, mask, rest = inputs["input_ids"], inputs["attention_mask"], {**inputs}
    del rest["input_ids"], rest["attention_mask"]
    expected = compressed.model(**inputs).last_hidden_state
    assert torch.equal(compressed.model(ids, mask, **rest).last_hidden_state, expected)
    named = {"attention_mask": mask, "second_per_grid_ts": inputs["second_per_grid_ts"]}
    grids = ids, inputs["mm_token_type_ids"], None, inputs["video_grid_thw"]
    positions, _ = compressed.model.get_rope_index(*grids, **named)
    again, _ = compressed.model.get_rope_index(*grids[:2], video_grid_thw=grids[3], **named)
    assert torch.equal(positions, again)


def test_modes_of_the_guide_stay_as_they_are():
    model, processor = families.build("qwen2_5_vl")
    guide, words = families.guide()
    ppllava.compress(model.train(), processor, guide=(guide.eval(), words), **BLOCKS)
    assert not any(module.training for module in guide.modules())


@family()
def test_names_of_the_inputs(name):
    _, new = ppllava.compress(*families.built(name), guide=families.guide(), **BLOCKS)
    assert {*ask(name, new)} <= {*new.model_input_names}
