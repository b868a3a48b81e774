"""What `ppllava ask` does, step by step: files, prompt, model, answer."""

from __future__ import annotations

import inspect
import mimetypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TextStreamer

from . import presets
from .configuration_ppllava import PPLlavaConfig
from .console import Exit, Failure, is_memory, sentence, shown
from .modeling_ppllava import PPLlavaForConditionalGeneration
from .options import Dtype
from .packing import decode_answers
from .pooling import BUDGETED
from .preprocessing import open_image, read_image
from .processing_ppllava import PPLlavaProcessor
from .request import MAX_NEW_TOKENS
from .sampling import check_count
from .turns import render_turn, special_tokens

# Pillow opens these as images, and they may be clips. A photo of a phone (MPO) or a scan (TIFF) with several is none,
# and of a WebP, which FFmpeg does not play, the first image is taken.
ANIMATED = ("GIF", "PNG", "AVIF")


# Files


@dataclass
class Medium:
    """A file that is asked about.

    source  what the processor takes: a `VideoClip`, or a PIL image
    frames  uint8 [T, H, W, 3]
    """

    path: str
    kind: str
    source: Any
    frames: np.ndarray

    def summary(self) -> dict[str, Any]:
        known = {"path": self.path, "kind": self.kind, "frames": len(self.frames)}
        if self.kind == "video":
            known.update(indices=self.source.indices.tolist(), timestamps=self.source.timestamps.tolist())
        return known


def kind_of(path: str) -> str:
    """What Pillow opens as a still image is an "image", all else a "video", unless the ending of the name says so."""
    ending = (mimetypes.guess_type(path)[0] or "").partition("/")[0]
    if ending == "video" or not os.path.isfile(path):
        return "video"
    try:
        with open_image(path) as image:
            animated = image.format in ANIMATED and getattr(image, "is_animated", False)
    except Exception:  # Pillow's plugins raise many
        return "image" if ending == "image" else "video"
    return "video" if animated else "image"


def read(path: str, kind: str, **sampling: Any) -> Medium:
    """A file, decoded once. `sampling` of a video as in `read_video`."""
    from .video import VideoError, read_video

    try:
        if kind == "image":
            image = read_image(path)
            return Medium(path, kind, image, np.asarray(image)[None])
        clip = read_video(path, **sampling)
        return Medium(path, kind, clip, clip.frames)
    except (VideoError, OSError) as error:
        if _past_limit(path, error):
            raise _too_many(path) from error
        raise Failure(Exit.MEDIA, sentence(error)) from error
    except ValueError as error:
        if kind == "image":
            raise Failure(Exit.MEDIA, sentence(error)) from error
        if _past_limit(path, error):
            raise _too_many(path) from error
        raise Failure(Exit.USAGE, f"{path}: {sentence(error)}") from error  # the seconds or frames asked for


def _past_limit(path: str, error: Exception) -> bool:
    """Whether more is asked for than `read_video` gives at once; its remedies are no options of the command line."""
    said = str(error).removeprefix(path)
    return "max_bytes" in said or "max_frames" in said


def _too_many(path: str) -> Failure:
    remedy = "pass fewer --frames, a lower --fps, or a part of it with --start and --end"
    return Failure(Exit.USAGE, f"{path}: has more frames asked for than can be held at once; {remedy}")


# The prompt


def plan(
    config: PPLlavaConfig, processor: PPLlavaProcessor, groups: list[list[tuple[str, int]]], tokens: int | None
) -> None:
    """Set the pooling of model and processor to at most `tokens` for each video, and see whether the prompts can fit.

    groups  (kind, frames) of the files of each prompt
    """
    lengths = [frames for group in groups for kind, frames in group if kind == "video"]
    set_budget(config, processor, tokens)
    most = getattr(config.vision_config, "adapter_max_frames", None)
    images = max(sum(kind == "image" for kind, _ in group) for group in groups)
    if most is not None and max(lengths, default=0) > most:
        raise Failure(
            Exit.USAGE,
            f"videos must have at most {most} frames for the BT-Adapter of this model, got {max(lengths)}; pass "
            f"--frames {most}",
        )
    if most is not None and images > most:
        raise Failure(
            Exit.USAGE,
            f"at most {most} images can be asked about together with the BT-Adapter of this model, got {images}; pass "
            "fewer, or --each",
        )
    pooling, limit = config.visual_pooling, config.context_length
    visual = max(sum(pooling.video_tokens(frames) for kind, frames in group if kind == "video") for group in groups)
    if limit is not None and visual >= limit:
        name, files = _named(len(groups))
        raise Failure(
            Exit.PROMPT,
            f"{name} has {visual} tokens of videos alone, and with question and answer it must fit into the {limit} of "
            f"the model; pass fewer --frames{files} or --tokens",
        )


def set_budget(config: PPLlavaConfig, processor: PPLlavaProcessor, tokens: int | None) -> None:
    """At most `tokens` for each video."""
    if tokens is None:
        return
    if config.pooling not in BUDGETED:
        raise Failure(
            Exit.USAGE,
            f"--tokens needs a model whose pooling has a budget, got {config.pooling!r}; use fewer --frames",
        )
    config.pooling_max_tokens = processor.pooling_max_tokens = tokens


def render(processor: PPLlavaProcessor, name: str, groups: list[list[str]], question: str) -> list[str]:
    """The text of each prompt, by the chat template of the model: a group of files of these kinds, and the question.

    Raises:
        Failure: where the template fails, does not end, or does not write one placeholder for each file.
    """
    for token in (processor.image_token, processor.video_token):
        if token in question:
            raise Failure(Exit.USAGE, f"QUESTION must not hold {token}, which stands for a file; leave it out")
    texts = []
    with loading(name):
        for kinds in groups:
            try:
                text = render_turn(processor, kinds, question)
            except Exception as error:  # it is a program
                raise ValueError(
                    f"its chat template fails ({sentence(error)}); convert the model again, or mend the template"
                ) from error
            for kind, token in (("image", processor.image_token), ("video", processor.video_token)):
                if (got := text.count(token)) != kinds.count(kind):
                    raise ValueError(
                        f"its chat template must write one {token} for each {kind}, got {got} for {kinds.count(kind)}; "
                        "convert the model again"
                    )
            texts.append(text)
    return texts


def prompt(processor: PPLlavaProcessor, texts: list[str], groups: list[list[Medium]], question: str) -> Any:
    """The inputs of the model: one prompt for each group of files, of the texts that :func:`render` made of them."""
    media = [medium for group in groups for medium in group]
    sources = {kind: [medium.source for medium in media if medium.kind == kind] for kind in ("image", "video")}
    return processor(
        text=texts,
        images=sources["image"] or None,
        videos=sources["video"] or None,
        guide_text=[question] * len(texts),
        padding_side="left",  # answers continue at the end
        **special_tokens(processor, texts[0]),
    )


def room(config: PPLlavaConfig, inputs: Any, asked: int | None) -> int:
    """How many tokens an answer may have: as many as asked for, or as the context leaves after the longest prompt."""
    limit = config.context_length
    if limit is None:
        return asked or MAX_NEW_TOKENS
    ids = inputs["input_ids"]  # [N, S]
    length = ids.shape[1]
    longest = ids[inputs["attention_mask"].sum(dim=1).argmax()]  # [S]
    visual = sum(int((longest == token).sum()) for token in (config.image_token_id, config.video_token_id))
    name, files = _named(len(ids))
    shorten = f"pass fewer --frames or --tokens{files}, or a shorter question"
    if length >= limit:
        raise Failure(
            Exit.PROMPT,
            f"{name} has {length} tokens, {visual} of them visual, and with the answer it must fit into the "
            f"{limit} of the model; {shorten}",
        )
    if asked is not None and length + asked > limit:
        raise Failure(
            Exit.PROMPT,
            f"{name} of {length} tokens, {visual} of them visual, and --max-new-tokens {asked} must fit into the "
            f"{limit} of the model; pass at most --max-new-tokens {limit - length}, or {shorten}",
        )
    return asked or min(MAX_NEW_TOKENS, limit - length)


def _named(prompts: int) -> tuple[str, str]:
    """What the longest prompt is called, and what else makes it shorter."""
    return ("the prompt", ", fewer files") if prompts == 1 else ("the longest prompt", "")


# The model


def device_of(name: str | None) -> torch.device:
    """The device of this name; without one a GPU where there is one.

    Raises:
        Failure: where this machine has none of this name.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:
        if is_memory(error):
            raise
        raise Failure(Exit.USAGE, f"--device must be one of this machine, got {name!r}; try cpu") from error
    return device


def load_processor(model: str | None, preset: str | None) -> tuple[PPLlavaConfig, PPLlavaProcessor]:
    """All but the weights."""
    if preset is not None:
        config = presets.preset_config(preset)
        return config, presets.build_processor(config)
    if not os.path.isdir(model):
        raise Failure(
            Exit.MODEL,
            f"--model must be a folder that `save_pretrained` or `ppllava convert` wrote, got {model!r}, which is no "
            "folder; download it first",
        )
    with loading(model):
        found = PPLlavaConfig.get_config_dict(model)[0].get("model_type")
        if found != PPLlavaConfig.model_type:
            raise ValueError(f"config.json must have model_type 'ppllava', got {found!r}; pass the folder of a PPLLaVA")
        if not os.path.isfile(os.path.join(model, "processor_config.json")):
            remedy = "convert it again, with --tokenizer and --guide-tokenizer"
            raise ValueError(f"it has no processor_config.json; {remedy}")
        config = PPLlavaConfig.from_pretrained(model, trust_remote_code=False)
        processor = PPLlavaProcessor.from_pretrained(model, trust_remote_code=False)
        check_count("num_frames", processor.num_frames)
        return config, processor


def load_model(
    model: str | None, preset: str | None, config: PPLlavaConfig, device: torch.device, dtype: Dtype
) -> PPLlavaForConditionalGeneration:
    if preset is not None:
        chosen = dtype.torch or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        network = presets.build_model(preset, dtype=chosen, device=device)
        network.config.pooling_max_tokens = config.pooling_max_tokens
        return network
    with loading(model):
        return PPLlavaForConditionalGeneration.from_pretrained(
            model, config=config, dtype=dtype.torch or "auto", device_map=str(device), trust_remote_code=False
        ).eval()


@contextmanager
def loading(model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_memory(error):
            raise
        reason = sentence(error)
        if "trust_remote_code" in reason:
            reason = "it needs Python code of its own, which is never run; give it a tokenizer that transformers has"
        raise Failure(Exit.MODEL, f"the model in {model!r} cannot be loaded: {reason}") from error


@contextmanager
def answering(model: str | None) -> Iterator[None]:
    """What `generate` raises is about the generation_config.json of a folder; presets have none."""
    try:
        yield
    except (ValueError, TypeError, IndexError, ImportError) as error:
        if model is None:
            raise
        raise Failure(
            Exit.MODEL, f"the model in {model!r} cannot answer with its generation_config.json: {sentence(error)}"
        ) from error


def encode(network: PPLlavaForConditionalGeneration, inputs: Any) -> dict[str, Any]:
    """Images and videos as the language model sees them; takes their pixels out of the inputs."""
    names = inspect.signature(network.model.get_media_features).parameters
    features = network.get_media_features(**{name: inputs.pop(name) for name in names if name in inputs})
    if network.device.type == "cuda":
        torch.cuda.synchronize()  # for the clock
    return features


class Stream(TextStreamer):
    """Collects the answers to a batch of prompts; with `echo` prints that to an only prompt as it comes.

    first  time.perf_counter() of the first tokens
    """

    def __init__(self, tokenizer: Any, echo: bool) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.echo, self.steps, self.first = echo, [], None

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.first = self.first or time.perf_counter()
        self.steps.append(value)  # [N]
        if self.echo:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.echo:
            super().on_finalized_text(shown(text), stream_end)

    def answers(self, ends: int | list[int] | None) -> list[tuple[str, int]]:
        """As :func:`decode_answers`."""
        return decode_answers(self.tokenizer, torch.stack(self.steps, dim=1).tolist(), ends)  # of [N, T]


def visual_tokens(media: list[Medium], features: dict[str, Any]) -> list[int]:
    """Those of each file."""
    counts = {kind: iter([len(x) for x in output.pooler_output]) for kind, output in features.items()}
    return [next(counts[medium.kind]) for medium in media]


__all__ = [
    "Medium",
    "Stream",
    "answering",
    "device_of",
    "encode",
    "kind_of",
    "load_model",
    "load_processor",
    "plan",
    "prompt",
    "read",
    "render",
    "room",
    "set_budget",
    "visual_tokens",
]
