"""The ops as modules."""

from __future__ import annotations

from torch import Tensor, nn

from .backends import check_name
from .checks import check_channels_last, check_logit_scale, check_temperature, check_tensors
from .compat import FakeTensor
from .functional import (
    Size,
    prompt_guided_pool3d,
    prompt_guided_project,
    prompt_relevance,
    weighted_pool3d,
    weighted_project,
)
from .shapes import make_window

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_TENSORS = (nn.Parameter, Tensor, FakeTensor)  # the last while torch.export traces


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


class PromptGuidedProjector(PromptGuidedPool3d):
    """:func:`prompt_guided_project` on the modules of a model that is there.

    A module that is wrapped or changed (LoRA, quantised weights, offloading, hooks, a subclass, another `act`) is
    called as it is: the same result, with a tensor of T*H*W x D' where that is `linear_1`, `act` or `linear_2`. Hooks
    for all modules, as profilers set them, do not count.

    Args:
        norm: the guide's layer norm over features; None leaves them as they are.
        guide: from there into the space of the text, CLIP's visual projection; None is a plain mean, without text.
        linear_1, linear_2: of the projector, with exact gelu, `act`, between them.
        The rest as :class:`PromptGuidedPool3d`; wrong ones raise here, and so do layers that do not chain.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        guide: nn.Module | None,
        linear_1: nn.Module,
        linear_2: nn.Module,
        kernel_size: Size | None = None,
        stride: Size | None = None,
        output_size: Size | None = None,
        *,
        logit_scale: float | Tensor = 100.0,
        temperature: float = 0.01,
        return_relevance: bool = False,
        backend: str | None = None,
    ) -> None:
        _check_modules(norm, guide, linear_1, linear_2, return_relevance)
        scores = dict(logit_scale=logit_scale, temperature=temperature, return_relevance=return_relevance)
        super().__init__(kernel_size, stride, output_size, **scores, backend=backend)
        self.norm, self.guide = norm, guide
        self.linear_1, self.act, self.linear_2 = linear_1, nn.GELU(), linear_2

    def forward(
        self, features: Tensor, text_embeds: Tensor | None = None, cu_frames: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """features [B, T, H, W, V], text_embeds [B, C] -> pooled [B, To, Ho, Wo, D]; ragged with cu_frames."""
        arguments = self._arguments() | dict(cu_frames=cu_frames)
        if (text_embeds is None) != (self.guide is None):
            wanted = "None for a projector without guide" if self.guide is None else "given"
            got = None if text_embeds is None else f"shape {list(text_embeds.shape)}"
            raise ValueError(f"text_embeds must be {wanted}, got {got}; a guide and one prompt per video go together")
        if text_embeds is None:
            return self.project(features, None, **arguments)
        pooled, relevance = self.project_guided(
            features, text_embeds, self.norm, self.guide, logit_scale=self.logit_scale, **arguments
        )
        return (pooled, relevance) if self.return_relevance else pooled

    def project_guided(
        self,
        features: Tensor,  # [B, T, H, W, V] or [F, H, W, V]
        text_embeds: Tensor,  # [B, C]
        norm: nn.Module | None,
        guide: nn.Module,
        *,
        logit_scale: float | Tensor = 100.0,
        cu_frames: Tensor | None = None,
        backend: str | None = None,
        **window,
    ) -> tuple[Tensor, Tensor]:
        """(pooled, relevance) of :func:`prompt_guided_project` with this guide and window, and the layers of self."""
        where = dict(cu_frames=cu_frames, backend=backend)
        guided = _is_plain(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1
        guided = guided and _is_plain(guide, nn.Linear) and guide.bias is None
        if guided and self._are_plain():
            return prompt_guided_project(
                features,
                text_embeds,
                norm_weight=norm.weight,
                norm_bias=norm.bias,
                norm_eps=norm.eps,
                guide_weight=guide.weight,
                logit_scale=logit_scale,
                return_relevance=True,
                **self._weights(),
                **where,
                **window,
            )
        _check_features(features, cu_frames, "guide", guide)
        image_embeds = guide(features if norm is None else norm(features))  # [B, T, H, W, C]
        relevance = prompt_relevance(image_embeds, text_embeds, logit_scale=logit_scale, **where)
        return self.project(features, relevance, **where, **window), relevance

    def project(self, features: Tensor, weights: Tensor | None, **arguments) -> Tensor:
        """:func:`weighted_project` of features [B, T, H, W, V] and scores [B, T, H, W] with the layers of self."""
        if self._are_plain():
            return weighted_project(features, weights, **self._weights(), **arguments)
        _check_features(features, arguments.get("cu_frames"), "linear_1", self.linear_1)
        return self.linear_2(weighted_pool3d(self.act(self.linear_1(features)), weights, **arguments))

    def _weights(self) -> dict[str, Tensor | None]:
        names = [(layer, part) for layer in ("linear_1", "linear_2") for part in ("weight", "bias")]
        return {f"{layer}_{part}": getattr(getattr(self, layer), part) for layer, part in names}

    def _are_plain(self) -> bool:
        linear = _is_plain(self.linear_1, nn.Linear) and _is_plain(self.linear_2, nn.Linear)
        return linear and _is_plain(self.act, nn.GELU) and self.act.approximate == "none"


def _is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether `module` computes what a `kind` with its tensors does, so that an op may read these instead.

    parametrize changes the type; accelerate sets `_hf_hook` and forward; torchao replaces the weight by a subclass.
    """
    return (
        type(module) is kind
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not hasattr(module, "_hf_hook")
        and "forward" not in vars(module)
        and all(x is None or type(x) in _TENSORS for x in module._parameters.values())
    )


def _check_features(features: Tensor, cu_frames: Tensor | None, name: str, module: nn.Module) -> None:
    """What `module`, which is called as it is, would say in words of its own."""
    check_tensors(cu_frames, features=features)
    check_channels_last("features", features, cu_frames, "V")
    width = getattr(module, "in_features", features.shape[-1])
    if width != features.shape[-1]:
        raise ValueError(
            f"features must have the V = {width} channels that {name} takes, got {list(features.shape)}; "
            "pass the features of the vision tower that it belongs to"
        )


def _check_modules(
    norm: nn.Module | None, guide: nn.Module | None, linear_1: nn.Module, linear_2: nn.Module, return_relevance: bool
) -> None:
    given = dict(norm=norm, guide=guide, linear_1=linear_1, linear_2=linear_2)
    for name, module in given.items():
        if not isinstance(module, nn.Module) and (name.startswith("linear") or module is not None):
            optional = "" if name.startswith("linear") else "None or "
            kind = "LayerNorm" if name == "norm" else "Linear"
            raise TypeError(
                f"{name} must be {optional}a module, got {type(module).__name__}; pass the nn.{kind} of the model"
            )
    if guide is None and norm is not None:
        raise ValueError(f"norm must be None where guide is, got {type(norm).__name__}; pass the guide's projection")
    if guide is None and return_relevance:
        raise ValueError("return_relevance must be False without guide, got True; a plain mean has no relevance")
    # [out, in] of those that say so: the parts of some wrappers do.
    shapes = {
        name: [module.out_features, module.in_features]
        for name, module in given.items()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    if "linear_1" in shapes and "linear_2" in shapes and shapes["linear_1"][0] != shapes["linear_2"][1]:
        raise ValueError(
            f"linear_2 must be [D, D'] with D' = {shapes['linear_1'][0]} to follow linear_1 {shapes['linear_1']}, got "
            f"{shapes['linear_2']}; pass the two layers of one projector"
        )
    if "guide" in shapes and "linear_1" in shapes and shapes["guide"][1] != shapes["linear_1"][1]:
        raise ValueError(
            f"guide must be [C, V] with V = {shapes['linear_1'][1]} to take what linear_1 {shapes['linear_1']} takes, "
            f"got {shapes['guide']}; use guide and projector of one vision tower"
        )
    if isinstance(norm, nn.LayerNorm) and "guide" in shapes and [*norm.normalized_shape] != shapes["guide"][1:]:
        raise ValueError(
            f"norm must be over [V] = {shapes['guide'][1:]} to precede guide {shapes['guide']}, got "
            f"{[*norm.normalized_shape]}; pass the layer norm that comes before the projection"
        )
