"""From features of the vision tower to tokens of the language model: the projector, and the pooling inside it."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor, nn

from ppllava_kernels import PromptGuidedProjector, prompt_relevance

from .compat import ACT2FN
from .configuration_ppllava import PPLlavaConfig
from .guide import PPLlavaGuide
from .media import Clip
from .pooling import Window


class PPLlavaProjector(PromptGuidedProjector):
    """LLaVA's projector and the pooling in one op; each call brings the guide of the model and its windows.

    The op pools between the two layers: the weights of a window sum to one, so pooling commutes with the linear second
    layer, which runs on 18 times fewer rows; and nothing of size T*H*W x D is written.
    """

    def __init__(self, config: PPLlavaConfig) -> None:
        width, act = config.token_width, config.projector_hidden_act
        layers = nn.Linear(config.vision_config.hidden_size, width), nn.Linear(width, width)
        super().__init__(None, None, *layers, kernel_size=1)
        self.act = nn.GELU() if act == "gelu" else ACT2FN[act]
        self.config = config

    def forward(
        self,
        features: Tensor,  # [F, H, W, V]
        clips: list[Clip],
        guide: PPLlavaGuide,
        text_embeds: Tensor | None,  # [B, C]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """(tokens [T', Ho, Wo, D], relevance [T, H, W]) of each of the B clips; one ragged op call per window size.

        Without text_embeds nothing is guided, and there is no relevance.
        """
        windows: dict[Window, list[int]] = {}
        for i, clip in enumerate(clips):
            windows.setdefault(clip.window, []).append(i)
        parts = features.split([clip.frames for clip in clips])
        tokens, relevance = [None] * len(clips), [None] * len(clips)
        for window, chosen in windows.items():
            everything = len(chosen) == len(clips)
            # Without guidance the views of an image have nothing in common, and an output_size is of each.
            lengths = [
                length
                for i in chosen
                for length in ([1] * clips[i].frames if clips[i].sizes and text_embeds is None else [clips[i].frames])
            ]
            pooled, scores = self._project(
                features if everything else torch.cat([parts[i] for i in chosen]),
                guide,
                text_embeds if everything or text_embeds is None else text_embeds[chosen],
                lengths,
                window,
            )
            shapes = [self._pooled_shape(clips[i]) for i in chosen]
            rows = pooled.flatten(0, -2).split([math.prod(shape) for shape in shapes])  # of each clip [tokens, D]
            for i, row, shape in zip(chosen, rows, shapes):
                tokens[i] = row.unflatten(0, shape)
            if scores is not None:
                for i, score in zip(chosen, scores.split(lengths)):
                    relevance[i] = score
        return tokens, None if text_embeds is None else relevance

    def _project(
        self, features: Tensor, guide: PPLlavaGuide, text_embeds: Tensor | None, lengths: list[int], window: Window
    ) -> tuple[Tensor, Tensor | None]:
        """(pooled [..., D], relevance [F, H, W] or None) of clips of so many frames, one after the other."""
        # On the CPU, where the op reads it without a synchronisation.
        cu_frames = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")  # [B+1]
        options = {"temperature": self.config.pooling_temperature, "cu_frames": cu_frames, **window._asdict()}
        options["backend"] = self.backend
        if text_embeds is None:
            return self.project(features, None, **options), None
        if not self.config.siglip:
            towards = guide.norm, guide.visual_projection
            return self.project_guided(features, text_embeds, *towards, logit_scale=guide.scale, **options)
        image_embeds, attention = guide.look(features)  # [F, H, W, C], [F, H, W]
        score = {"logit_scale": guide.scale, "cu_frames": cu_frames, "backend": self.backend}
        relevance = prompt_relevance(image_embeds, text_embeds, **score)
        if attention is not None:
            relevance = 1000 * attention * relevance
        return self.project(features, relevance, **options), relevance

    def extra_repr(self) -> str:
        return ""  # window, temperature and scale are those of a call

    def _pooled_shape(self, clip: Clip) -> tuple[int, ...]:
        pooling = self.config.visual_pooling
        if clip.sizes:  # each view is pooled for itself
            return (clip.frames, *pooling.pooled_size(1, clip.window)[1:])
        return pooling.pooled_size(clip.frames, clip.window)


__all__ = ["PPLlavaProjector"]
