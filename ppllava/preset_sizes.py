"""The sizes of :mod:`ppllava.presets`, as plain data: the command line names them before PyTorch is imported."""

from __future__ import annotations

# The tokenizers: one token per byte, so any text encodes.
PAD, BOS, EOS, VIDEO, IMAGE = "<pad>", "<s>", "</s>", "<video>", "<image>"
SPECIAL = {PAD: 0, BOS: 1, EOS: 2, VIDEO: 3, IMAGE: 4}
GUIDE_SPECIAL = {"<|startoftext|>": 256, "<|endoftext|>": 257}  # after the bytes, as CLIP has them


def clip_tower(
    image_size: int, patch_size: int, hidden_size: int, layers: int, heads: int, projection_dim: int
) -> dict:
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


def clip_guide(hidden_size: int, layers: int, heads: int, projection_dim: int, vocab_size: int = 258) -> dict:
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


def view_grids(size: int) -> list[list[int]]:
    """LLaVA-NeXT's grids of views."""
    return [[size * rows, size * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]


_TINY = {
    "vision_config": clip_tower(42, 7, hidden_size=32, layers=3, heads=2, projection_dim=16),
    "guide_config": clip_guide(24, layers=2, heads=3, projection_dim=16),
    # Weights large enough that one token changes the logits visibly.
    "text_config": _llama(48, 96, layers=2, heads=4, num_key_value_heads=2, initializer_range=0.2),
}
_ADAPTER = {"model_type": "ppllava_btadapter_vision_model", "adapter_depth": 2, "adapter_max_frames": 64}
PRESETS = {
    "tiny": _TINY,
    "tiny-btadapter": {**_TINY, "vision_config": {**_TINY["vision_config"], **_ADAPTER}},
    "tiny-qwen2": {
        **_siglip(42, 7, hidden_size=32, intermediate_size=64, layers=3, heads=2),
        "text_config": _qwen2(48, 96, layers=2, heads=4, kv_heads=2, initializer_range=0.2),
    },
    "small": {
        "vision_config": clip_tower(336, 14, hidden_size=128, layers=10, heads=2, projection_dim=64),
        "guide_config": clip_guide(64, layers=2, heads=1, projection_dim=64),
        "text_config": _llama(512, 1408, layers=16, heads=8, max_position_embeddings=32768),
    },
    "vicuna-7b": {
        "vision_config": clip_tower(336, 14, hidden_size=1024, layers=24, heads=16, projection_dim=768),
        "guide_config": clip_guide(768, layers=12, heads=12, projection_dim=768, vocab_size=49408),
        "text_config": _llama(4096, 11008, layers=32, heads=32, vocab_size=32064, max_position_embeddings=4096),
    },
    "qwen2-7b": {
        **_siglip(384, 14, hidden_size=1152, intermediate_size=4304, layers=27, heads=16),
        "text_config": _qwen2(
            3584, 18944, layers=28, heads=28, kv_heads=4, vocab_size=152064, max_position_embeddings=32768
        ),
    },
}
NAMES = tuple(PRESETS)

__all__ = [
    "BOS",
    "EOS",
    "GUIDE_SPECIAL",
    "IMAGE",
    "NAMES",
    "PAD",
    "PRESETS",
    "SPECIAL",
    "VIDEO",
    "clip_guide",
    "clip_tower",
    "view_grids",
]
