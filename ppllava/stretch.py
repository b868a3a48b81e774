"""The position table of a stock text tower made long enough for the guide."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel


def stretch_position_embedding(table: Tensor, keep: int = 20, factor: int = 4) -> Tensor:
    """Long-CLIP's stretch of a position table: [L, D] -> [keep + factor * (L - keep), D]; 77 -> 248, 64 -> 196.

    The first `keep` rows are kept, the well-trained ones; after them each row is followed by factor - 1 rows
    interpolated towards the next, and the last row by as many extrapolated with its last step.
    """
    if table.dim() != 2 or len(table) < keep + 2:
        raise ValueError(
            f"table must be [L, D] with L at least keep + 2 = {keep + 2}, got shape {list(table.shape)}; "
            "pass the weight of a position embedding"
        )
    tail = table[keep:].to(torch.promote_types(table.dtype, torch.float32))  # [N, D]
    step = torch.cat([tail[1:], 2 * tail[-1:] - tail[-2:-1]]) - tail  # [N, D]
    share = torch.arange(factor, device=tail.device, dtype=tail.dtype) / factor  # [factor]
    stretched = tail[:, None] + share[:, None] * step[:, None]  # [N, factor, D]
    return torch.cat([table[:keep], stretched.flatten(0, 1).to(table.dtype)])


def stretch_text_model(text_model: PreTrainedModel, keep: int = 20, factor: int = 4) -> PreTrainedModel:
    """A copy of a stock CLIP or SigLIP text tower with its position table stretched, 77 -> 248 or 64 -> 196."""
    state = text_model.state_dict()
    name = "embeddings.position_embedding.weight"
    state[name] = stretch_position_embedding(state[name], keep, factor)
    config = copy.deepcopy(text_model.config)
    config.max_position_embeddings = len(state[name])
    stretched = type(text_model)(config).to(device=text_model.device, dtype=text_model.dtype)
    stretched.load_state_dict(state)
    return stretched.train(text_model.training)


__all__ = ["stretch_position_embedding", "stretch_text_model"]
