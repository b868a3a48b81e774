"""What compares the tokens of another video LLM with the question: a CLIP or SigLIP model, or the half of one."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipModel,
)

from ppllava_kernels import prompt_relevance

from ..compat import (
    HOOK,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    align_module_device,
)
from ..configuration_ppllava import PPLlavaConfig
from ..guide import PPLlavaGuide
from .windows import joined

MODELS = {"clip": CLIPModel, "siglip": SiglipModel}
# The checkpoints whose vision towers, of these (hidden_size, image_size, patch_size), video LLMs are built on.
KNOWN = {
    ("clip_vision_model", 1024, 336, 14): "openai/clip-vit-large-patch14-336",
    ("siglip_vision_model", 1152, 384, 14): "google/siglip-so400m-patch14-384",
}
FRAMES = 32  # that go through an external guide at once


class SwapGuide(nn.Module):
    """A CLIP or SigLIP model as the guide of another video LLM; its modules are shared, not copied.

        r_i = softmax_i(s cos(e_i, c)),    e_i, c as in :class:`ppllava.guide.PPLlavaGuide`

    Where its vision tower is that of the video LLM, the e_i are made from the features which that has computed anyway,
    and the tower is left out. Any other one runs on the frames, resized to its own size.

    Args:
        model: CLIPModel or SiglipModel.
        tower: the vision tower of the video LLM, or None.
        mean, std: of the pixel values that the video LLM gets.
    """

    def __init__(
        self, model: CLIPModel | SiglipModel, tower: PreTrainedModel | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        siglip = isinstance(model, SiglipModel)
        config = PPLlavaConfig(
            vision_config=copy.deepcopy(model.config.vision_config),
            guide_config=copy.deepcopy(model.config.text_config),
            projection_dim=model.config.vision_config.hidden_size if siglip else model.config.projection_dim,
            pooling_kernel_size=1,
        )
        with torch.device("meta"):
            guide = PPLlavaGuide(config)
        guide.text_model, guide.logit_scale = model.text_model, model.logit_scale
        guide.norm = model.vision_model.post_layernorm
        if siglip:
            guide.head = model.vision_model.head
        else:
            guide.visual_projection, guide.text_projection = model.visual_projection, model.text_projection
        self.guide = guide
        self.tower = None if same_tower(tower, model.vision_model) else model.vision_model
        # As PPLLaVA: the last layer of SigLIP, the one before it of CLIP.
        self.layer = -1 if siglip else -2
        own = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD) if siglip else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        # Of each channel (that of the pixels, that of the guide).
        self.mean, self.std = tuple(zip(mean, own[0])), tuple(zip(std, own[1]))

    @property
    def max_length(self) -> int:
        """Positions of the text tower."""
        return self.guide.config.guide_config.max_position_embeddings

    @property
    def padding(self) -> str:
        """How questions are padded: SigLIP was trained on the full length."""
        return "max_length" if self.guide.config.siglip else "longest"

    def prepare(self, frames: Tensor) -> Tensor:
        """frames [F, 3, h, w], pixel values of the video LLM -> those of the guide's own tower [F, 3, S, S]."""
        size, frames = self.guide.config.vision_config.image_size, frames.to(torch.float32)
        (mean, own_mean), (std, own_std) = (frames.new_tensor(x).T[:, :, None, None] for x in (self.mean, self.std))
        frames = F.interpolate(frames * std + mean, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return (frames - own_mean) / own_std

    def look(self, frames: Tensor) -> Tensor:
        """:meth:`prepare` d frames [F, 3, S, S] -> features [F, h, w, V] of the guide's own tower."""
        parts = [
            self.tower(part, output_hidden_states=True).hidden_states[self.layer]
            for part in self._here(frames).split(FRAMES)
        ]
        return to_grid(joined(parts), self.guide.config.patch_grid)

    def relevance(
        self, features: Tensor, guide_input_ids: Tensor, guide_attention_mask: Tensor | None, frames: Sequence[int]
    ) -> Tensor:
        """features [F, h, w, V] of clips of so many frames, ids and mask [B, L] -> float32 [F, h, w], 1 in each."""
        features = self._here(features)
        ids = (x if x is None else x.to(features.device) for x in (guide_input_ids, guide_attention_mask))
        text_embeds = self.guide.embed_text(*ids)  # [B, C]
        siglip = self.guide.config.siglip
        image_embeds = self.guide.look(features)[0] if siglip else self.guide.embed_patches(features)  # [F, h, w, C]
        cu_frames = torch.tensor([0, *accumulate(frames)], dtype=torch.int32, device="cpu")  # [B+1]
        return prompt_relevance(image_embeds, text_embeds, logit_scale=self.guide.scale, cu_frames=cu_frames)

    def _here(self, x: Tensor) -> Tensor:
        """x on the device of the guide, which may be another than the model's, and in its dtype."""
        weight = self.guide.norm.weight
        return x.to(x.device if weight.is_meta else weight.device, weight.dtype)  # offloaded, it takes any device


def to_grid(hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """hidden [F, positions, V] of a vision tower -> [F, h, w, V], without the class token where there is one."""
    return hidden[:, hidden.shape[1] - grid[0] * grid[1] :].unflatten(1, grid)


def same_tower(tower: PreTrainedModel | None, other: PreTrainedModel) -> bool:
    """Whether a tower is another, or was trained on from it: of the same sizes, and patches are embedded alike."""
    if tower is None or tower.config.model_type != other.config.model_type:
        return False
    names = ("hidden_size", "intermediate_size", "image_size", "patch_size", "num_attention_heads")
    if any(getattr(tower.config, name) != getattr(other.config, name) for name in names):
        return False
    pair = []
    for layer in (tower.embeddings.patch_embedding, other.embeddings.patch_embedding):
        with _present(layer):
            pair.append(layer.weight.detach().to("cpu", torch.float32).flatten())
    return F.cosine_similarity(*pair, dim=0).item() > 0.5


def _present(layer: nn.Module) -> AbstractContextManager:
    """In which its weights are there, also where accelerate has them offloaded."""
    if not layer.weight.is_meta:
        return nullcontext()
    return align_module_device(layer, "cpu")


def load_guide(guide: Any, model: PreTrainedModel, tower: PreTrainedModel | None) -> tuple[PreTrainedModel, Any]:
    """(CLIPModel or SiglipModel, its tokenizer) for the argument `guide` of `ppllava.compress`, which is not None."""
    if isinstance(guide, os.PathLike):
        guide = os.fspath(guide)
    if isinstance(guide, tuple):
        kinds = (tuple(MODELS.values()), PreTrainedTokenizerBase)
        if len(guide) != 2 or not all(map(isinstance, guide, kinds)):
            got = ", ".join(type(part).__name__ for part in guide)
            raise TypeError(
                f"guide must be a pair of a CLIPModel or SiglipModel and its tokenizer, got ({got}); pass both, or "
                "the name of their checkpoint"
            )
        if len(guide[1]) > (most := guide[0].config.text_config.vocab_size):
            raise ValueError(
                f"guide must be a pair of a model and its own tokenizer, got one of {len(guide[1])} tokens for a text "
                f"tower of {most}; load both from one checkpoint"
            )
        return guide
    if isinstance(guide, tuple(MODELS.values())):
        if not guide.name_or_path:
            raise ValueError(
                f"guide must come with its tokenizer, got a {type(guide).__name__} that was not loaded from a "
                "checkpoint; pass guide=(model, tokenizer)"
            )
        return guide, AutoTokenizer.from_pretrained(guide.name_or_path, trust_remote_code=False)
    if not isinstance(guide, str):
        raise TypeError(
            f"guide must be 'auto', None, a checkpoint of CLIP or SigLIP, such a model, or a pair of it and its "
            f"tokenizer, got {type(guide).__name__}; pass for example 'openai/clip-vit-base-patch16'"
        )
    name = _known(model, tower) if guide == "auto" else guide
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type not in MODELS:
        raise ValueError(
            f"guide must be a checkpoint of a model of type {' or '.join(MODELS)}, got {name!r} of type "
            f"{config.model_type!r}; pass for example 'openai/clip-vit-base-patch16'"
        )
    loaded = MODELS[config.model_type].from_pretrained(name, dtype=model.dtype, trust_remote_code=False)
    return loaded.to(_device(model)).eval(), AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _device(model: PreTrainedModel) -> torch.device:
    """Where a model runs: its weights are elsewhere while accelerate has them offloaded."""
    hooks = (getattr(module, HOOK, None) for module in model.modules())
    runs = (getattr(hook, "execution_device", None) for hook in hooks)
    return (
        torch.device(next((x for x in runs if x is not None), "cpu")) if model.device.type == "meta" else model.device
    )


def _known(model: PreTrainedModel, tower: PreTrainedModel | None) -> str:
    if tower is not None:
        sizes = (tower.config.hidden_size, tower.config.image_size, tower.config.patch_size)
        if (name := KNOWN.get((tower.config.model_type, *sizes))) is not None:
            return name
        has = f"a {tower.config.model_type} that no checkpoint of a text tower is known for"
    else:
        has = "no CLIP or SigLIP tower"
    raise ValueError(
        f"guide='auto' needs a model whose text tower is known, and {type(model).__name__} has {has}; pass the "
        "checkpoint that its vision tower comes from, any other CLIP or SigLIP as in "
        "guide='openai/clip-vit-base-patch16', which then looks at small frames, or guide=None for the plain mean"
    )


__all__ = ["SwapGuide", "load_guide", "to_grid"]
