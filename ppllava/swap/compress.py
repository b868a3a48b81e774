"""`compress`: a video LLM of transformers and its processor, with fewer visual tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import transformers
from transformers import PreTrainedModel, ProcessorMixin

from . import models, processors
from .guides import SwapGuide, load_guide
from .twins import twin
from .windows import Windows


class Family(NamedTuple):
    """A video LLM of transformers.

    name, model, processor             as its users call it, and its classes
    model_mixin, processor_mixin       what changes them
    tower                              attribute of the base model: a vision tower that may be CLIP's or SigLIP's
    """

    name: str
    model: str
    processor: str
    model_mixin: type[models.CompressedModel]
    processor_mixin: type[processors.CompressedProcessor]
    tower: str | None = None


FAMILIES = (
    Family(
        "LLaVA-NeXT-Video",
        "LlavaNextVideoForConditionalGeneration",
        "LlavaNextVideoProcessor",
        models.LlavaVideo,
        processors.LlavaVideoProcessor,
        "vision_tower",
    ),
    Family(
        "LLaVA-OneVision",
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionProcessor",
        models.LlavaOnevision,
        processors.LlavaOnevisionProcessor,
        "vision_tower",
    ),
    Family(
        "Video-LLaVA",
        "VideoLlavaForConditionalGeneration",
        "VideoLlavaProcessor",
        models.VideoLlava,
        processors.VideoLlavaProcessor,
        "video_tower",
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLProcessor",
        models.QwenVL,
        processors.QwenVLProcessor,
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLProcessor",
        models.QwenVL,
        processors.Qwen3VLProcessor,
    ),
    Family(
        "InternVL",
        "InternVLForConditionalGeneration",
        "InternVLProcessor",
        models.InternVL,
        processors.InternVLProcessor,
    ),
)


def compress(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    *,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    output_size: int | Sequence[int] | None = None,
    guide: Any = "auto",
    temperature: float = 0.01,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    r"""A video LLM of transformers that pools its video tokens under the guidance of the prompt.

    .. math:: y_o = \sum_{i \in o} \mathrm{softmax}_{i \in o}(r_i / \tau) \, v_i

    v_i are the tokens that the model would have given to its language model, on their grid (T, H, W); r_i, the
    relevance of each to the user's question, sums to 1 over a video. Images, and prompts without a video, stay as they
    are. (PPLLaVA, arXiv 2411.02327, section 3.2.)

    Args:
        model: LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA, Qwen2.5-VL, Qwen3-VL or InternVL: a
            `...ForConditionalGeneration` of transformers with any weights, on any device, also quantized.
        processor: the one that belongs to it.
        kernel_size, stride, output_size: the windows over (T, H, W) in tokens of the model, as in
            :func:`ppllava_kernels.weighted_pool3d`; one of kernel_size and output_size. A clip with fewer frames than
            the kernel is one window in time. T of Qwen is half the frames.
        guide: what compares tokens with the question.
            "auto": the checkpoint that the model's vision tower is known to come from (LLaVA-NeXT-Video,
            LLaVA-OneVision); loading it may download it.
            A checkpoint of CLIP or SigLIP, such a model that was loaded from one, or (model, tokenizer): where its
            vision tower is the one that the video LLM is built on, the features of that are compared and its own is not
            run; any other one looks at the frames at its own size, of Qwen the first of each two, and its relevance
            map is laid over the token grid.
            None: the plain mean.
        temperature: tau > 0.

    Returns:
        (model, processor): of subclasses of their classes. All weights, modules and tokenizers are shared with those
        that were passed, which stay as they are; the new ones go when they are dropped. `model.prompt_guide` is the
        guide, whose modules are shared with the CLIP or SigLIP model, and get gradients.

    Raises:
        TypeError: for a model of another family, or for another processor than the model's.
        ValueError: for windows or a guide that cannot work; the message says what to do.
    """
    family = _family(model)
    if isinstance(processor, processors.CompressedProcessor):
        raise ValueError(
            f"processor must not be compressed yet, got {type(processor).__qualname__}; pass its `swapped`"
        )
    if not isinstance(processor, getattr(transformers, family.processor)):
        raise TypeError(
            f"processor must be the {family.processor} of {type(model).__name__}, got {type(processor).__name__}; load "
            "both from one checkpoint"
        )
    windows = Windows.of(kernel_size, stride, output_size, temperature)
    prompt_guide = tokens = None
    if guide is not None:
        tower = None if family.tower is None else getattr(model.model, family.tower)
        if tower is not None and tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            tower = None
        loaded, tokenizer = load_guide(guide, model, tower)
        video = processor.video_processor
        prompt_guide = SwapGuide(loaded, tower, video.image_mean, video.image_std)
        tokens = processors.GuideTokens(tokenizer, prompt_guide.max_length, prompt_guide.padding)
    new = twin(processor, family.processor_mixin)
    new.windows, new.guide, new.config, new.swapped = windows, tokens, model.config, processor
    return compress_model(model, windows, prompt_guide), new


def _family(model: Any) -> Family:
    if isinstance(model, models.CompressedLLM):
        raise ValueError(f"model must not be compressed yet, got {type(model).__qualname__}; pass model.swapped_model")
    for family in FAMILIES:
        if isinstance(model, getattr(transformers, family.model)):
            return family
    known = ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)
    raise TypeError(
        f"model must be one of {known}, got {type(model).__name__}; call the ops of ppllava_kernels in your own model "
        "instead, docs/swap.md shows how"
    )


def compress_model(model: PreTrainedModel, windows: Windows, prompt_guide: SwapGuide | None) -> PreTrainedModel:
    """The model of :func:`compress` alone, whose inputs are then made without its processor; `windows` are those of
    both, and a `prompt_guide` of None is the plain mean."""
    mixin = _family(model).model_mixin
    base = twin(model.model, mixin)
    base.windows = windows
    base.register_module("prompt_guide", prompt_guide)
    base.encoders = {
        kind: frozenset(inspect.signature(getattr(base, f"get_{kind}_features")).parameters) - {"kwargs"}
        for kind in models.PIXELS
        if hasattr(base, f"get_{kind}_features")
    }
    new = twin(model, models.CompressedLLM, mixin.extra)
    new.model = base
    new.__dict__["swapped_model"] = model  # not a module of it
    new.generation_config = copy.deepcopy(model.generation_config)
    return new


__all__ = ["FAMILIES", "compress", "compress_model"]
