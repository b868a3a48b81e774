"""The ops as modules."""

from __future__ import annotations

from torch import Tensor, nn

from .backends import check_name
from .checks import check_logit_scale, check_temperature
from .functional import Size, prompt_guided_pool3d, weighted_pool3d
from .shapes import make_window


class WeightedPool3d(nn.Module):
    """:func:`weighted_pool3d` as a module; with `weights=None` a channels-last AvgPool3d or AdaptiveAvgPool3d.

    Args: as :func:`weighted_pool3d`; wrong ones raise here, not at the first call.
    """

    def __init__(
        self,
        kernel_size: Size | None = None,
        stride: Size | None = None,
        output_size: Size | None = None,
        *,
        temperature: float = 0.01,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        make_window(kernel_size, stride, output_size)
        self.kernel_size, self.stride, self.output_size = kernel_size, stride, output_size
        self.temperature = check_temperature(temperature)
        if backend is not None:
            check_name(backend)
        self.backend = backend

    def forward(self, values: Tensor, weights: Tensor | None = None, cu_frames: Tensor | None = None) -> Tensor:
        """values [B, T, H, W, D] -> pooled [B, To, Ho, Wo, D]; ragged with cu_frames."""
        return weighted_pool3d(values, weights, cu_frames=cu_frames, **self._arguments())

    def _arguments(self) -> dict:
        names = ("kernel_size", "stride", "output_size", "temperature", "backend")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._arguments().items() if value is not None)


class PromptGuidedPool3d(WeightedPool3d):
    """:func:`prompt_guided_pool3d` as a module.

    Args: as :func:`prompt_guided_pool3d`. A `logit_scale` that is an `nn.Parameter` is trained with the module.
    """

    def __init__(
        self,
        kernel_size: Size | None = None,
        stride: Size | None = None,
        output_size: Size | None = None,
        *,
        logit_scale: float | Tensor = 100.0,
        temperature: float = 0.01,
        return_relevance: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(kernel_size, stride, output_size, temperature=temperature, backend=backend)
        check_logit_scale(logit_scale)
        if isinstance(logit_scale, Tensor) and not isinstance(logit_scale, nn.Parameter):
            self.register_buffer("logit_scale", logit_scale)
        else:
            self.logit_scale = logit_scale
        self.return_relevance = return_relevance

    def forward(
        self, values: Tensor, image_embeds: Tensor, text_embeds: Tensor, cu_frames: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """values [B, T, H, W, D], image_embeds [B, T, H, W, C], text_embeds [B, C] -> pooled [B, To, Ho, Wo, D]."""
        return prompt_guided_pool3d(
            values,
            image_embeds,
            text_embeds,
            logit_scale=self.logit_scale,
            return_relevance=self.return_relevance,
            cu_frames=cu_frames,
            **self._arguments(),
        )
