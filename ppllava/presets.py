"""Named sizes with random weights: model, processor and tokenizers from nothing, without a network.

`tiny`, `tiny-btadapter` and `tiny-qwen2` are for tests: CLIP and Llama, the same with a BT-Adapter, SigLIP and Qwen2.
`small` is for benchmarks on a CPU; it has the token counts of `vicuna-7b` and spends its FLOPs in the same proportions
(`flops`). `vicuna-7b` and `qwen2-7b` are the real ones. Those with a plain CLIP tower have a peer: LLaVA-NeXT-Video of
transformers, same sizes.
"""

from __future__ import annotations

import math

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .compat import from_config
from .configuration_ppllava import PPLlavaConfig
from .modeling_ppllava import PPLlavaForConditionalGeneration
from .preset_sizes import BOS, EOS, GUIDE_SPECIAL, IMAGE, NAMES, PAD, PRESETS, SPECIAL, VIDEO, view_grids
from .processing_ppllava import PPLlavaProcessor


def preset_config(name: str) -> PPLlavaConfig:
    """The configuration of a preset; its token ids are those of the local tokenizers."""
    sizes = _sizes(name)
    vision = sizes["vision_config"]
    siglip = vision["model_type"] == "siglip_vision_model"
    return PPLlavaConfig(
        **sizes,
        projection_dim=vision["hidden_size" if siglip else "projection_dim"],
        vision_feature_layer=-1 if siglip else -2,
        image_grid_pinpoints=view_grids(vision["image_size"]),
        image_token_index=SPECIAL[IMAGE],
        video_token_index=SPECIAL[VIDEO],
    )


def peer_config(name: str) -> LlavaNextVideoConfig:
    """LLaVA-NeXT-Video with the vision tower and the language model of a preset: 144 tokens a frame at 336 pixels."""
    sizes = _sizes(name)
    if sizes["vision_config"]["model_type"] != "clip_vision_model":
        raise ValueError(f"name must be a preset with a plain CLIP tower, got {name!r}; LLaVA-NeXT-Video has no other")
    return LlavaNextVideoConfig(
        vision_config=sizes["vision_config"],
        text_config=sizes["text_config"],
        video_token_index=SPECIAL[VIDEO],
        image_token_index=SPECIAL[IMAGE],  # not used
    )


def build(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> tuple[PPLlavaForConditionalGeneration, PPLlavaProcessor]:
    """(model in eval mode, processor) of a preset; random weights, the same for the same seed, dtype and device.

    Raises:
        ValueError: for a name that is none of `NAMES`.
    """
    return build_model(name, dtype=dtype, device=device, seed=seed), build_processor(preset_config(name))


def build_model(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> PPLlavaForConditionalGeneration:
    """The model of a preset alone; arguments and errors as in :func:`build`."""
    return _random(PPLlavaForConditionalGeneration, preset_config(name), dtype, device, seed)


def build_peer(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
) -> LlavaNextVideoForConditionalGeneration:
    """The peer of a preset; arguments and errors as in :func:`build`. Its `<video>` id is that of the preset."""
    return _random(LlavaNextVideoForConditionalGeneration, peer_config(name), dtype, device, seed)


def build_processor(config: PPLlavaConfig) -> PPLlavaProcessor:
    """A processor with local tokenizers for a configuration of `preset_config`."""
    return PPLlavaProcessor.from_config(config, _tokenizer(), _guide_tokenizer())


def flops(config: PPLlavaConfig, frames: int, text_tokens: int, guide_tokens: int = 32) -> dict[str, int]:
    """FLOPs of the matrix products from pixels to the first generated token, for one video.

    Args:
        frames: of the video.
        text_tokens: of the prompt, besides the visual tokens.
        guide_tokens: of the question in the guide's vocabulary.

    Returns:
        vision_tower; projector with the guide, its text tower included; language_model, the prefill with the head at
        the last position. Attention counts the pairs of positions that see each other: all in the towers, those up to
        its own for a token of the language model. Elementwise work and the pooling are left out.
    """
    vision, guide, text = config.vision_config, config.guide_config, config.text_config
    grid, width = math.prod(config.patch_grid), vision.hidden_size
    patches, positions = frames * grid, grid if config.siglip else grid + 1  # the class token
    tokens = config.visual_pooling.video_tokens(frames)
    embed = 2 * patches * vision.num_channels * vision.patch_size**2 * width
    layer = _encoder_layer(positions, width, vision.intermediate_size)
    adapter_layers = max(getattr(vision, "adapter_depth", 0) + config.vision_layers - vision.num_hidden_layers, 0)
    # A spatial layer has one class token for all frames after its attention. A temporal layer attends over the frames
    # of each patch, and has one more matrix.
    spatial = frames * layer - (frames - 1) * 4 * width * vision.intermediate_size
    temporal = 2 * patches * 5 * width**2 + 4 * patches * frames * width
    tower = frames * config.vision_layers * layer + adapter_layers * (spatial + temporal)
    linear_1 = 2 * patches * width * text.hidden_size
    linear_2 = 2 * tokens * text.hidden_size**2
    if config.siglip:
        project = 2 * patches * width * (width + 2 * vision.intermediate_size) + 2 * guide.hidden_size * width
    else:
        project = 2 * (patches * width + guide.hidden_size) * config.projection_dim
    question = guide.num_hidden_layers * _encoder_layer(guide_tokens, guide.hidden_size, guide.intermediate_size)
    length = tokens + text_tokens
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    layer = 2 * length * weights + 2 * length * (length + 1) * queries
    return {
        "vision_tower": embed + tower,
        "projector": linear_1 + linear_2 + project + question,
        "language_model": text.num_hidden_layers * layer + 2 * text.hidden_size * text.vocab_size,
    }


def _encoder_layer(length: int, hidden_size: int, intermediate_size: int) -> int:
    return 2 * length * (4 * hidden_size**2 + 2 * hidden_size * intermediate_size) + 4 * length**2 * hidden_size


def _sizes(name: str) -> dict[str, dict]:
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return PRESETS[name]


def _random(cls: type[PreTrainedModel], config, dtype: torch.dtype, device: str | torch.device, seed: int):
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return from_config(cls, config, dtype=dtype).eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {**SPECIAL, **{byte: len(SPECIAL) + i for i, byte in enumerate(_alphabet())}}
    backend = _byte_level(vocabulary, SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _guide_tokenizer() -> PreTrainedTokenizerFast:
    start, end = GUIDE_SPECIAL
    backend = _byte_level({**{byte: i for i, byte in enumerate(_alphabet())}, **GUIDE_SPECIAL}, GUIDE_SPECIAL)
    backend.normalizer = normalizers.Lowercase()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=list(GUIDE_SPECIAL.items())
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=end,
        bos_token=start,
        eos_token=end,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(vocabulary: dict[str, int], special: dict[str, int]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


__all__ = ["NAMES", "build", "build_model", "build_peer", "build_processor", "flops", "peer_config", "preset_config"]
