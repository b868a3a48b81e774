"""Guide, projector and pooling against the original's numbers (tests/golden/README.md)."""

import re

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from golden_data import close, golden, meta, projector_model
from transformers import SiglipTextConfig, SiglipTextModel

from ppllava_kernels import functional

VARIANTS = {
    "variant_temp1": {"pooling_temperature": 1.0},
    "variant_overlap": {"pooling_kernel_size": (2, 4, 3), "pooling_stride": (1, 2, 2)},
    "variant_outsize": {"pooling_output_size": (2, 2, 3)},
}
CASES = [
    *(("proj_clip", name) for name in ("video_b1", "video_b2", "video_leftover", "image", "nomask_short", *VARIANTS)),
    *(("proj_clip_noextend", name) for name in ("video_b2", "image_fallback")),
    *(("proj_siglip", name) for name in ("video_b1", "video_b2", "video_leftover", "image", "short_text")),
    *(("proj_siglip_valuew", name) for name in ("video_b1", "video_leftover", "image", "short_text")),
]


def inputs_of(case):
    return "proj_siglip" if case == "proj_siglip_valuew" else case


def run(case, name, dtype=torch.float32, **changes):
    """(model, features of the vision tower [F, H, W, V], its output) for a golden case."""
    given = meta(case)
    source = given["cases"][name].get("inputs_of", name)
    config, inputs = given["config"], golden(inputs_of(case), "inputs")
    # A list of images is pooled with the windows of images; the original falls back to those of videos, two frames deep
    # in proj_clip_noextend, which mixes images: here that is a video.
    if not given["cases"][source]["video"] and config["image_pooling_kernel"]:
        changes = {"pooling_kernel_size": config["image_pooling_kernel"], "pooling_stride": None, **changes}
    model = projector_model(case, inputs_of(case), **{**VARIANTS.get(name, {}), **changes}).to(dtype)
    features = inputs[f"{source}/image_features"].unflatten(1, config["frame_shape"])
    features = features.to(model.device, dtype)  # [F, H, W, V]
    model.encode_frames = lambda *_: features
    model.config.vision_config.image_size = [n * model.config.vision_config.patch_size for n in config["frame_shape"]]
    frames = given["cases"][source]["num_frames"]
    pixels = blank(model, len(features)).to(dtype)
    with torch.no_grad():
        video = model.get_video_features(
            pixels, torch.full((len(features) // frames,), frames), **question(inputs, source, model.device)
        )
    return model, features, video


def blank(model, frames):
    """Pixels [frames, 3, S, S] that nobody looks at: the features come from the original."""
    size = model.config.visual_pooling.view_size
    return torch.zeros(frames, 3, size, size)


def question(inputs, source, device):
    given = {"guide_input_ids": inputs[f"{source}/clip_ids"], "guide_attention_mask": inputs.get(f"{source}/clip_mask")}
    return {name: x if x is None else x.to(device) for name, x in given.items()}


@pytest.fixture
def chosen(backend, monkeypatch):
    """Every backend in turn, for all ops that the model calls."""
    check = functional.check_backend
    monkeypatch.setattr(functional, "check_backend", lambda _, x, *order: check(backend, x))
    return backend


@pytest.mark.parametrize(("case", "name"), CASES)
def test_projector(case, name, chosen):
    model, features, video = run(case, name)
    outputs, inputs = golden(case, "outputs"), golden(inputs_of(case), "inputs")
    source = meta(case)["cases"][name].get("inputs_of", name)
    close(torch.stack(video.pooler_output).cpu(), outputs[f"{name}/out"], 2e-4)
    close(
        torch.stack(video.relevance).cpu(), outputs[f"{source}/tv_softmax"], 2e-4 if model.config.valuew_plus else 1e-5
    )
    with torch.no_grad():
        text = model.guide.embed_text(**question(inputs, source, model.device))
        close(text.cpu(), outputs[f"{source}/text_embeds_raw"], 2e-4)
        patches = model.guide.embed_patches(features).unflatten(0, (len(text), -1))  # [B, T, H, W, C]
        cosine = F.cosine_similarity(patches, text[:, None, None, None], dim=-1)
        close(cosine.cpu(), outputs[f"{source}/visual_attention"], 1e-5)
        if f"{name}/head_attn_weights" in outputs:
            expected = outputs[f"{name}/head_attn_weights"].mean(1)  # [F, L]
            close(model.guide.attend(features).flatten(1).cpu(), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["proj_clip", "proj_siglip"])
def test_half_precision_is_at_least_as_exact_as_the_original(case, dtype):
    outputs = golden(case, "outputs")
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    _, _, video = run(case, "video_b1", kind)
    exact, original = outputs["video_b1/out"], outputs[f"video_b1/out_{dtype}"]
    assert_close(f"{case} {dtype}", torch.stack(video.pooler_output), [original], exact.double())


def test_valuew_plus_in_batches():
    """The original reshapes for one video only and fails with two (meta.errors, batch2)."""
    assert meta("proj_siglip_valuew")["errors"]["batch2"]["type"] == "RuntimeError"
    model, _, _ = run("proj_siglip_valuew", "video_b1", torch.float64)
    inputs = golden("proj_siglip", "inputs")
    features = inputs["video_b2/image_features"].unflatten(1, (9, 9)).double()
    ids = inputs["video_b2/clip_ids"]

    def encode(rows, questions):
        model.encode_frames = lambda *_: rows
        with torch.no_grad():
            return model.get_video_features(
                blank(model, len(rows)).double(), torch.full((len(questions),), 2), questions
            ).pooler_output

    both = encode(features, ids)
    for i in range(2):
        # In float64: products of other sizes round in other ways, which the temperature of 0.01 amplifies.
        close(both[i], encode(features[2 * i : 2 * i + 2], ids[i : i + 1])[0], 1e-9)


def test_a_question_for_each_video():
    """The original cuts a larger batch of texts to the videos silently (meta, text_batch_2_with_one_video)."""
    inputs = golden("proj_clip", "inputs")
    model, _, _ = run("proj_clip", "video_b1")
    message = (
        "guide_input_ids must have one row for each of the 1 videos, got 2; repeat the question of a prompt for each "
        "of them, and leave out prompts without one"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.get_video_features(blank(model, 4), torch.tensor([4]), inputs["video_b2/clip_ids"])


def test_a_clip_of_one_frame():
    """The original fails where the kernel is deeper than the clip (meta.errors, one_frame_video_with_kernel2)."""
    assert "one_frame_video_with_kernel2" in meta("proj_clip")["errors"]
    inputs = golden("proj_clip", "inputs")
    model, features, _ = run("proj_clip", "video_b1")
    outs = []
    for kernel in ((2, 3, 3), (1, 3, 3)):
        model.config.pooling_kernel_size = model.config.pooling_stride = kernel
        model.encode_frames = lambda *_: features[:1]
        with torch.no_grad():
            outs += model.get_video_features(
                blank(model, 1), torch.tensor([1]), inputs["video_b1/clip_ids"]
            ).pooler_output
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["extend_false_with_siglip_weights", "extend_false_with_clip_weights"])
def test_siglip_without_stretched_positions(name):
    """The original loads a CLIP model there and fails (meta.errors); here it is SigLIP's own text tower."""
    given = meta("proj_siglip")
    assert name in given["errors"]
    text = {**given["siglip_config"]["text"], "max_position_embeddings": 64}
    ids = golden("proj_siglip", "inputs")["short_text/clip_ids"]
    stock = SiglipTextModel(SiglipTextConfig(**text)).eval()
    model = projector_model("proj_siglip")
    model.guide.text_model = stock
    model.config.guide_config.max_position_embeddings = 64
    with torch.no_grad():
        close(model.guide.embed_text(ids), stock(ids).pooler_output, 1e-6)
    with pytest.raises(ValueError, match="at most the 64 positions"):
        model.guide.embed_text(torch.ones(1, 65, dtype=torch.long))
