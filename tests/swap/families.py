"""Tiny random models and processors of each family that `ppllava.compress` knows, and of CLIP and SigLIP guides."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors as token_processors
from transformers import PreTrainedTokenizerFast

from ppllava.presets import _alphabet, _byte_level, _guide_tokenizer

VIDEO, IMAGE = "<video>", "<image>"
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
CLIP = dict(model_type="clip_vision_model", image_size=56, patch_size=7, projection_dim=16, **SIZES)
SIGLIP = dict(model_type="siglip_vision_model", image_size=56, patch_size=8, **SIZES)
# Weights large enough that one token changes the logits visibly.
LLM = dict(num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=4096, **(SIZES | {"hidden_size": 48}))
LLM["num_attention_heads"] = 4
NAMES = ("llava_next_video", "llava_onevision", "video_llava", "qwen2_5_vl", "qwen3_vl", "internvl")
OWN = ("llava_next_video", "llava_onevision", "video_llava")  # whose towers can be the guide's


def tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """One token per byte, and these special ones."""
    tokens = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *special])}
    backend = _byte_level({**tokens, **{byte: len(tokens) + i for i, byte in enumerate(_alphabet())}}, tokens)
    backend.post_processor = token_processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named,
    )


def _random(cls, config):
    torch.manual_seed(0)
    return cls._from_config(config).eval()


def _edge(size: int) -> dict:
    return {"height": size, "width": size}


def _llava(name: str, tower: dict, **kwargs):
    words = tokenizer([VIDEO, IMAGE])
    config = getattr(transformers, f"{name}Config")(
        vision_config=tower,
        text_config={"model_type": "llama", "vocab_size": len(words), **LLM},
        video_token_index=words.convert_tokens_to_ids(VIDEO),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        **kwargs,
    )
    return _random(getattr(transformers, f"{name}ForConditionalGeneration"), config), words


def llava_next_video():
    model, words = _llava("LlavaNextVideo", CLIP)
    video = transformers.LlavaNextVideoVideoProcessor(size={"shortest_edge": 56}, crop_size=_edge(56))
    image = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size=_edge(56), image_grid_pinpoints=[[56, 112], [112, 56]]
    )
    model.config.image_grid_pinpoints = [[56, 112], [112, 56]]
    select = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return model, transformers.LlavaNextVideoProcessor(video, image, words, **select)


def llava_onevision():
    model, words = _llava(
        "LlavaOnevision",
        SIGLIP,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[56, 112], [112, 56]],
    )
    video = transformers.LlavaOnevisionVideoProcessor(size=_edge(56))
    image = transformers.LlavaOnevisionImageProcessor(size=_edge(56), image_grid_pinpoints=[[56, 112], [112, 56]])
    select = {"num_image_tokens": 49, "vision_feature_select_strategy": "full"}
    return model, transformers.LlavaOnevisionProcessor(image, words, video, **select)


def video_llava():
    model, words = _llava("VideoLlava", CLIP | {"patch_size": 14})
    video = transformers.VideoLlavaVideoProcessor(size={"shortest_edge": 56}, crop_size=_edge(56))
    image = transformers.VideoLlavaImageProcessor(size={"shortest_edge": 56}, crop_size=_edge(56))
    return model, transformers.VideoLlavaProcessor(image, video, words, patch_size=14)


QWEN = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>"]


def _qwen(name: str, vision: dict, **text):
    words = tokenizer(QWEN)
    ids = dict(zip(QWEN, words.convert_tokens_to_ids(QWEN)))
    config = getattr(transformers, f"{name}Config")(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, **vision},
        text_config={"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **LLM, **text},
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _random(getattr(transformers, f"{name}ForConditionalGeneration"), config), words


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
    vision = {"patch_size": 8, "window_size": 32, "out_hidden_size": 48, "fullatt_block_indexes": [1]}
    model, words = _qwen("Qwen2_5_VL", vision, rope_parameters=rope)
    sizes = {"patch_size": 8, "size": {"shortest_edge": 28 * 28, "longest_edge": 84 * 84}}
    video = transformers.Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False)
    return model, transformers.Qwen2_5_VLProcessor(transformers.Qwen2VLImageProcessor(**sizes), words, video)


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
    vision = {"patch_size": 8, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    model, words = _qwen("Qwen3VL", vision, rope_parameters=rope, head_dim=12)
    sizes = {"patch_size": 8}
    video = transformers.Qwen3VLVideoProcessor(
        **sizes,
        size={"shortest_edge": 28 * 28, "longest_edge": 96 * 96 * 8},
        do_sample_frames=False,
        cap_pixels_per_frame=False,
    )
    image = transformers.Qwen2VLImageProcessor(**sizes, size={"shortest_edge": 28 * 28, "longest_edge": 96 * 96})
    return model, transformers.Qwen3VLProcessor(image, words, video)


def internvl():
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    words = tokenizer([*QWEN, *named.values(), VIDEO], **named, video_token=VIDEO)
    vision = {"image_size": 56, "patch_size": 7, "norm_type": "layer_norm", **SIZES}
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "vocab_size": len(words), **LLM},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    model = _random(transformers.InternVLForConditionalGeneration, config)
    video = transformers.InternVLVideoProcessor(size=_edge(56))
    image = transformers.GotOcr2ImageProcessor(size=_edge(56), crop_to_patches=True, max_patches=3)
    return model, transformers.InternVLProcessor(image, words, video, image_seq_length=16)


def build(name: str):
    """(model, processor) of a family."""
    return globals()[name]()


@cache
def built(name: str):
    """The same, for tests that change neither."""
    return build(name)


def prompt(name: str, question: str, kind: str | None = "video") -> str:
    """A prompt about one video or image, or None of them."""
    if name in OWN:
        return f"USER: {f'<{kind}>' + chr(10) if kind else ''}{question} ASSISTANT:"
    media = "" if kind is None else f"<|vision_start|><|{kind}_pad|><|vision_end|>"
    if name == "qwen3_vl" and kind == "video":
        media = "<|video_pad|>"
    if name == "internvl" and kind:
        media = (VIDEO if kind == "video" else "<IMG_CONTEXT>") + "\n"
    return f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"


def clip(frames: int, seed: int = 0, height: int = 64, width: int = 80) -> np.ndarray:
    """uint8 [T, H, W, 3], smooth enough that patches differ in what CLIP sees; Qwen3-VL does not resize it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def guide(kind: str = "clip", tower=None):
    """(CLIPModel or SiglipModel, tokenizer); with a tower, one whose vision tower has these weights."""
    words, text = _guide_tokenizer(), {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    if kind == "clip":
        vision = (tower.config.to_dict() if tower is not None else CLIP | {"image_size": 42}) | {"projection_dim": 16}
        text |= dict(max_position_embeddings=77, projection_dim=16, **SIZES)
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    else:
        vision = tower.config.to_dict() if tower is not None else SIGLIP | {"image_size": 40}
        text |= dict(max_position_embeddings=64, projection_size=32, **SIZES)
        config = transformers.SiglipConfig(vision_config=vision, text_config=text)
    model = _random(transformers.CLIPModel if kind == "clip" else transformers.SiglipModel, config)
    if tower is not None:
        model.vision_model.load_state_dict(tower.state_dict(), strict=False)
    return model, words


QUESTIONS = ["What is it?", "Why is the man in the middle so tall?"]
CLIPS = [clip(8, seed=1), clip(5, seed=2)]
WINDOWS = {
    "blocks": {"kernel_size": (2, 2, 2)},
    "overlap": {"kernel_size": (3, 3, 2), "stride": (1, 1, 2), "temperature": 0.3},
    "longer_than_a_clip": {"kernel_size": (6, 1, 2)},
    "adaptive": {"output_size": (3, 2, 3)},
}
BLOCKS = WINDOWS["blocks"]


def family(names=NAMES):
    """For each of these families."""
    return pytest.mark.parametrize("name", names)
