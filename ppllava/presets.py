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
from .processing_ppllava import PPLlavaProcessor

# The tokenizers: one token per byte, so any text encodes.
PAD, BOS, EOS, VIDEO, IMAGE = "<pad>", "<s>", "</s>", "<video>", "<image>"
SPECIAL = {PAD: 0, BOS: 1, EOS: 2, VIDEO: 3, IMAGE: 4}
GUIDE_SPECIAL = {"<|startoftext|>": 256, "<|endoftext|>": 257}  # after the bytes, as CLIP has them


def _clip(image_size: int, patch_size: int, hidden_size: int, layers: int, heads: int, projection_dim: int) -> dict:
    return {
        "model_type": "clip_vision_model",
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection_dim,
    }


def _guide(hidden_size: int, layers: int, heads: int, projection_dim: int, vocab_size: int = 258) -> dict:
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection_dim,
        "max_position_embeddings": 248,
        "bos_token_id": GUIDE_SPECIAL["<|startoftext|>"],
        "eos_token_id": GUIDE_SPECIAL["<|endoftext|>"],
        "pad_token_id": GUIDE_SPECIAL["<|endoftext|>"],
    }


def _llama(hidden_size: int, intermediate_size: int, layers: int, heads: int, vocab_size: int = 320, **kwargs) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "pad_token_id": SPECIAL[PAD],
        "bos_token_id": SPECIAL[BOS],
        "eos_token_id": SPECIAL[EOS],
        **kwargs,
    }


def _siglip(
    image_size: int, patch_size: int, hidden_size: int, intermediate_size: int, layers: int, heads: int
) -> dict:
    """Both towers, which have one width."""
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    vision = {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": patch_size}
    text = {"model_type": "siglip_text_model", "max_position_embeddings": 196, "projection_size": hidden_size}
    end = GUIDE_SPECIAL["<|endoftext|>"]
    ids = {"bos_token_id": GUIDE_SPECIAL["<|startoftext|>"], "eos_token_id": end, "pad_token_id": end}
    return {"vision_config": {**vision, **sizes}, "guide_config": {**text, **sizes, **ids, "vocab_size": 258}}


def _qwen2(hidden_size: int, intermediate_size: int, layers: int, heads: int, kv_heads: int, **kwargs) -> dict:
    llama = _llama(hidden_size, intermediate_size, layers, heads, num_key_value_heads=kv_heads, **kwargs)
    return {**llama, "model_type": "qwen2"}


def _grids(size: int) -> list[list[int]]:
    """LLaVA-NeXT's grids of views."""
    return [[size * rows, size * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


_TINY = {
    "vision_config": _clip(42, 7, hidden_size=32, layers=3, heads=2, projection_dim=16),
    "guide_config": _guide(24, layers=2, heads=3, projection_dim=16),
    # Weights large enough that one token changes the logits visibly.
    "text_config": _llama(48, 96, layers=2, heads=4, num_key_value_heads=2, initializer_range=0.2),
}
_ADAPTER = {"model_type": "ppllava_btadapter_vision_model", "adapter_depth": 2, "adapter_max_frames": 64}
_PRESETS = {
    "tiny": _TINY,
    "tiny-btadapter": {**_TINY, "vision_config": {**_TINY["vision_config"], **_ADAPTER}},
    "tiny-qwen2": {
        **_siglip(42, 7, hidden_size=32, intermediate_size=64, layers=3, heads=2),
        "text_config": _qwen2(48, 96, layers=2, heads=4, kv_heads=2, initializer_range=0.2),
    },
    "small": {
        "vision_config": _clip(336, 14, hidden_size=128, layers=10, heads=2, projection_dim=64),
        "guide_config": _guide(64, layers=2, heads=1, projection_dim=64),
        "text_config": _llama(512, 1408, layers=16, heads=8, max_position_embeddings=32768),
    },
    "vicuna-7b": {
        "vision_config": _clip(336, 14, hidden_size=1024, layers=24, heads=16, projection_dim=768),
        "guide_config": _guide(768, layers=12, heads=12, projection_dim=768, vocab_size=49408),
        "text_config": _llama(4096, 11008, layers=32, heads=32, vocab_size=32064, max_position_embeddings=4096),
    },
    "qwen2-7b": {
        **_siglip(384, 14, hidden_size=1152, intermediate_size=4304, layers=27, heads=16),
        "text_config": _qwen2(
            3584, 18944, layers=28, heads=28, kv_heads=4, vocab_size=152064, max_position_embeddings=32768
        ),
    },
}
NAMES = tuple(_PRESETS)


def preset_config(name: str) -> PPLlavaConfig:
    """The configuration of a preset; its token ids are those of the local tokenizers."""
    sizes = _sizes(name)
    vision = sizes["vision_config"]
    siglip = vision["model_type"] == "siglip_vision_model"
    return PPLlavaConfig(
        **sizes,
        projection_dim=vision["hidden_size" if siglip else "projection_dim"],
        vision_feature_layer=-1 if siglip else -2,
        image_grid_pinpoints=_grids(vision["image_size"]),
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
    config = preset_config(name)
    return _random(PPLlavaForConditionalGeneration, config, dtype, device, seed), build_processor(config)


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
    if name not in _PRESETS:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    return _PRESETS[name]


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


__all__ = ["NAMES", "build", "build_peer", "build_processor", "flops", "peer_config", "preset_config"]
