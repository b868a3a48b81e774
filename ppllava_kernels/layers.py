"""The pooling modules as layers of the `kernels` package: their forward alone, for a module that has their arguments.

`kernels` puts these forwards on modules of a model, so that they may have no constructor and no other member.
"""

from __future__ import annotations

from torch import Tensor, nn

from .functional import prompt_guided_pool3d, weighted_pool3d


class WeightedPool3d(nn.Module):
    """For a module with `kernel_size`, `stride`, `output_size` and `temperature`, and with `backend` or without."""

    can_torch_compile = True

    def forward(self, values: Tensor, weights: Tensor | None = None, cu_frames: Tensor | None = None) -> Tensor:
        """values [B, T, H, W, D], weights [B, T, H, W] -> pooled [B, To, Ho, Wo, D]; ragged with cu_frames."""
        return weighted_pool3d(values, weights, cu_frames=cu_frames, **_arguments(self))


class PromptGuidedPool3d(nn.Module):
    """As :class:`WeightedPool3d`, and with `logit_scale` and `return_relevance`."""

    can_torch_compile = True

    def forward(
        self, values: Tensor, image_embeds: Tensor, text_embeds: Tensor, cu_frames: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """values [B, T, H, W, D], image_embeds [B, T, H, W, C], text_embeds [B, C] -> pooled [B, To, Ho, Wo, D]."""
        scores = dict(logit_scale=self.logit_scale, return_relevance=self.return_relevance)
        return prompt_guided_pool3d(
            values, image_embeds, text_embeds, cu_frames=cu_frames, **scores, **_arguments(self)
        )


def _arguments(module: nn.Module) -> dict:
    names = ("kernel_size", "stride", "output_size", "temperature")
    return {name: getattr(module, name) for name in names} | dict(backend=getattr(module, "backend", None))
