"""Sizes of a model that cannot be: refused with their key, before a list or a tensor of that size is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Several times what the largest models have. The names are those of transformers and of its older configurations.
LARGEST = (
    (r"num_hidden_layers|num_layers|n_layers?|adapter_depth", 1_000),
    (r"num_attention_heads|num_key_value_heads|n_heads?", 10_000),
    (r"hidden_size|n_embd|d_model|head_dim|word_embed_proj_dim|projection_dim|projection_size", 2**17),
    (r"intermediate_size|n_inner|ffn_dim", 2**20),
    (r"vocab_size", 2**24),
    (r"image_size|patch_size", 2**14),
    (r"num_channels", 2**10),
    (r"guide_max_length", 2**17),
    (r"adapter_max_frames", 2**20),
    (r"max_position_embeddings|n_positions", 2**30),
)
GUIDE_POSITIONS = 2**17  # a table of a text tower has a row for each


def check_sizes(section: str | None, values: Mapping[str, Any]) -> None:
    """Refuse numbers that are no size of any model, such as 1e9 layers.

    Args:
        section: the key of config.json that the values stand under, or None for those at its top.
        values: by key; what is no number, or no size, is left to other checks.

    Raises:
        ValueError: for the first one that is out of range.
    """
    for key, value in values.items():
        most = next((most for names, most in LARGEST if re.fullmatch(names, key)), None)
        if section == "guide_config" and key == "max_position_embeddings":
            most = GUIDE_POSITIONS
        if most is None:
            continue
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not 1 <= number <= most:
                name = key if section is None else f"{key} of {section}"
                raise ValueError(f"{name} must be in 1 ... {most:,}, got {number!r}; correct the configuration")


__all__ = ["check_sizes"]
