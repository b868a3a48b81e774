"""The whole model against the original's numbers, loaded from the original's own folders (tests/golden/README.md)."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from golden_batches import batch, media_types, tensor, together
from golden_data import GOLDEN, close, meta
from tiny import attended

from ppllava import PPLlavaForConditionalGeneration

CASES = [
    (case, name) for case in ("model", "model_qwen") for name in meta(case)["cases"] if not name.startswith("pooling_")
]
GENERATED = [(case, name) for case in ("model", "model_qwen") for name in meta(case)["generate"] if "beam" not in name]


@cache
def load(case):
    model = PPLlavaForConditionalGeneration.from_pretrained(GOLDEN / case / "hf").eval()
    model.generation_config.eos_token_id = None
    return model


def side(name):
    return "right" if name == "batch_right" else "left"


@pytest.mark.parametrize(("case", "name"), CASES)
def test_logits(case, name):
    """video_T3 and multi_image_T3: the original takes three frames for three channels; here they are read correctly."""
    model, made = load(case), batch(load(case), case, name)
    inputs, outputs = made.inputs(side(name)), made.outputs()
    with torch.no_grad():
        logits = attended(inputs, model(**inputs).logits)
    key = next(key for key in ("logits_if_read_correctly", "logits", "logits_last8_attended") if key in outputs)
    if key == "logits_last8_attended":
        close(torch.stack([row[-8:] for row in logits]), outputs[key], 1e-3)
        return
    mask = outputs.get("merged_attention_mask", inputs["attention_mask"]).bool()
    for row, expected, seen in zip(logits, outputs[key], mask):
        close(row, expected[seen], 1e-3)
    if "logits_if_read_correctly" in outputs:
        assert (outputs["logits"] - outputs[key])[mask].abs().max() > 1


def recorded(case, name):
    """The prompts of a case whose visual tokens are recorded."""
    keys = meta(case)["tensors"]["outputs"]
    return [i for i in range(len(media_types(case, name))) if f"{name}/visual_{i}" in keys]


@pytest.mark.parametrize(("case", "name", "i"), [(*each, i) for each in CASES for i in recorded(*each)])
def test_visual_tokens(case, name, i):
    model = load(case)
    made = batch(model, case, name, only=i)
    outputs = made.outputs()
    with torch.no_grad():
        [features] = model.get_media_features(**made.media).values()
    expected = outputs.get(f"visual_{i}_if_read_correctly", outputs[f"visual_{i}"])
    close(torch.stack(features.pooler_output), expected, 2e-4)
    if f"tv_softmax_{i}" in outputs:
        close(features.relevance[0], outputs[f"tv_softmax_{i}"][0], 1e-5)


@pytest.mark.parametrize(("case", "name"), [each for each in CASES if each[1] != "text_only"])
def test_merged_inputs(case, name):
    model, made = load(case).model, batch(load(case), case, name)
    inputs, outputs = made.inputs(side(name)), made.outputs()
    mask = outputs["merged_attention_mask"].bool()
    assert [len(row) for row in made.rows] == mask.sum(1).tolist()
    positions = model.positions(None, inputs["attention_mask"], None, inputs["input_ids"].shape[1])["position_ids"]
    for row, expected, seen in zip(attended(inputs, positions), outputs["merged_position_ids"], mask):
        assert torch.equal(row, expected[seen])
    if "merged_inputs_embeds" in outputs:
        with torch.no_grad():
            embeds = model.embed(inputs["input_ids"], **made.media)
        for row, expected, seen in zip(attended(inputs, embeds), outputs["merged_inputs_embeds"], mask):
            close(row, expected[seen], 2e-4)


@pytest.mark.parametrize(
    ("case", "name"), [each for each in CASES if f"{each[1]}/loss" in meta(each[0])["tensors"]["outputs"]]
)
def test_loss(case, name):
    model, made = load(case), batch(load(case), case, name)
    inputs, outputs = made.inputs(side(name)), made.outputs()
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, given, seen in zip(range(len(labels)), outputs["merged_labels"], outputs["merged_attention_mask"].bool()):
        labels[row, inputs["attention_mask"][row].bool()] = given[seen]
    with torch.no_grad():
        close(model(**inputs, labels=labels).loss, outputs["loss"], 1e-3)


@pytest.mark.parametrize(("case", "name"), GENERATED)
def test_generated_ids(case, name):
    """batch_left_tokpad: the original attends to such pads from the second step on; here it is as without cache."""
    model, made = load(case), batch(load(case), case, name)
    inputs, outputs = made.inputs("left"), made.outputs()
    count = meta(case)["generate"][name]["max_new_tokens"]
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    expected = outputs.get("generate_greedy_nocache", outputs["generate_greedy"])
    assert torch.equal(ids[:, -count:], expected[:, -count:])
    static = model.generate(**inputs, max_new_tokens=count, do_sample=False, cache_implementation="static")
    assert torch.equal(static, ids)


def test_generated_ids_of_beams():
    model, made = load("model"), batch(load("model"), "model", "video")
    ids = model.generate(**made.inputs(), num_beams=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(ids[:, -8:], made.outputs()["generate_beam3"][:, -8:])


def test_video_visual_attention():
    model, made = load("model").model, batch(load("model"), "model", "video")
    with torch.no_grad():
        features = model.encode_frames(made.media["pixel_values_videos"], [6])  # [6, 12, 12, V]
        text = model.guide.embed_text(made.media["guide_input_ids"], made.media["guide_attention_mask"])
        cosine = F.cosine_similarity(model.guide.embed_patches(features), text, dim=-1)
    close(cosine[None], made.outputs()["visual_attention"], 1e-5)


def test_video_vision_hidden():
    model, made = load("model").model, batch(load("model"), "model", "video")
    with torch.no_grad():
        hidden = model.vision_tower(made.media["pixel_values_videos"], frames=[6]).last_hidden_state  # [6, 145, 32]
    close(hidden[[0, 5]], made.outputs()["vision_hidden_m2_frames0_last"], 2e-4)


POOLINGS = {
    "pooling_avp": ({"pooling": "temporal_mean"}, 6),
    "pooling_none": ({"pooling": "none"}, 6 * 144 // 8),
    "pooling_pllava": ({"pooling": "adaptive_mean", "pooling_output_size": [2, 4, 4]}, 1),
    "pooling_pllava_npu": ({"pooling": "adaptive_mean", "pooling_output_size": [2, 4, 4]}, 1),
}


@pytest.fixture
def changed():
    """The CLIP model, its configuration free to change."""
    model = load("model")
    before = dict(model.config.__dict__)
    yield model
    model.config.__dict__.update(before)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling(name, changed):
    fields, every = POOLINGS[name]
    changed.config.__dict__.update(fields)
    made = batch(changed, "model", name)
    del made.media["guide_input_ids"], made.media["guide_attention_mask"]
    with torch.no_grad():
        features = changed.get_media_features(**made.media)["video"]
        assert changed(**made.inputs()).logits.isfinite().all()
    assert features.relevance is None
    close(features.pooler_output[0][None, ::every], made.outputs()["visual_0"], 1e-4)


# What the original rejects (meta.errors), one test each: an error here, too, or what was meant.


def run(model, made, **changes):
    inputs = {**made.inputs(), **changes}
    with torch.no_grad():
        return inputs, model(**inputs).logits


@pytest.mark.parametrize(("name", "found"), [("two_image_tokens_one_video", 49), ("no_image_token_but_a_video", 0)])
def test_error_placeholders(name, found):
    assert name in meta("model")["errors"]
    made = batch(load("model"), "model", "video")
    video = load("model").config.video_token_id
    ids = made.inputs()["input_ids"]
    ids = torch.cat([ids, torch.tensor([[video]])], 1) if found else ids.masked_fill(ids == video, 5)
    with pytest.raises(ValueError, match=f"48 for the 1 videos, got {found};"):
        run(load("model"), made, input_ids=ids, attention_mask=torch.ones_like(ids))


def test_error_one_frame_video(changed):
    """Here one frame is one window in time: the same tokens as with a kernel one frame deep."""
    made = batch(changed, "model", "video")
    one = {"pixel_values_videos": made.media["pixel_values_videos"][:1], "video_frames": torch.tensor([1])}
    tokens = []
    for kernel in ([2, 3, 3], [1, 3, 3]):
        changed.config.__dict__.update(pooling_kernel_size=kernel, pooling_stride=kernel)
        with torch.no_grad():
            tokens += changed.get_media_features(**{**made.media, **one})["video"].pooler_output
    assert tokens[0].shape == (16, 40)
    assert torch.equal(*tokens)


def test_error_T_gt_max_T():
    model, made = load("model").model, batch(load("model"), "model", "video")
    pixels = made.media["pixel_values_videos"].repeat(3, 1, 1, 1)[:17]
    with pytest.raises(ValueError, match=r"^a clip must have at most adapter_max_frames = 16 .*, got .*17"):
        model.get_media_features(**{**made.media, "pixel_values_videos": pixels, "video_frames": torch.tensor([17])})


@pytest.mark.parametrize(
    "name",
    [
        "a_text_token_whose_embedding_is_all_zero",
        "left_padding_with_all_zero_pad_embedding",
        "right_padding_with_all_zero_pad_embedding",
    ],
)
def test_error_zero_embeddings(name):
    """The original finds placeholders by embeddings of zero, and text or padding with one confuses it."""
    assert name in meta("model")["errors"]
    model = PPLlavaForConditionalGeneration.from_pretrained(GOLDEN / "model" / "hf").eval()
    made = batch(model, "model", "batch_left")
    place = "right" if name.startswith("right") else "left"
    inputs = made.inputs(place)
    token = 0 if "padding" in name else made.rows[0][1][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = 0
        for i, row in enumerate(attended(inputs, model(**inputs).logits)):
            close(row, model(**batch(model, "model", "batch_left", only=i).inputs()).logits[0], 1e-4)


def test_error_no_clip_ids():
    made = batch(load("model"), "model", "video")
    with pytest.raises(ValueError, match=r"^guide_input_ids must be given with pixel_values_videos, got None"):
        run(load("model"), made, guide_input_ids=None, guide_attention_mask=None)


def test_error_batch_with_one_text_only_sample():
    model, made = load("model"), batch(load("model"), "model", "video")
    text = batch(model, "model", "text_only")
    made.rows += text.rows
    inputs, logits = run(model, made)
    close(attended(inputs, logits)[1], text.outputs()["logits"][0], 1e-3)


@pytest.mark.parametrize(
    "name", ["pooling_avp_image", "pooling_none_image", "pooling_pllava_image", "pooling_pllava_npu_image"]
)
def test_error_pooling_image(name, changed):
    """PLLaVA's poolings of the original take no images; here each view is pooled to (1, 4, 4)."""
    changed.config.__dict__.update(POOLINGS[name.removesuffix("_image")][0])
    made = batch(changed, "model", "image_grid")
    with torch.no_grad():
        [tokens] = changed.get_media_features(**made.media)["image"].pooler_output
    assert len(tokens) == (70 if "pllava" in name else 144 + 18 * 24 + 18)
    assert run(changed, made)[1].isfinite().all()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("names", [["batch_left"], ["batch_mixed"], ["image_grid", "multi_image", "video", "text"]])
@pytest.mark.parametrize("case", ["model", "model_qwen"])
def test_a_batch_is_each_sample_alone(case, names, padding):
    model = load(case)
    names = [name for name in names if name in meta(case)["cases"]] or ["batch_left"]
    singles = [batch(model, case, name, only=i) for name in names for i in range(len(media_types(case, name)))]
    inputs = together(singles).inputs(padding)
    with torch.no_grad():
        rows = attended(inputs, model(**inputs).logits)
        for row, single in zip(rows, singles):
            close(row, model(**single.inputs()).logits[0], 1e-4)


def test_the_mask_of_the_question_changes_nothing():
    made = batch(load("model"), "model", "video")
    inputs = made.inputs()
    with torch.no_grad():
        close(load("model")(**{**inputs, "guide_attention_mask": None}).logits, load("model")(**inputs).logits, 1e-5)
    assert tensor("model", "video", "clip_mask") is not None
