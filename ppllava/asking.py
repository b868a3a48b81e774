"""What `ppllava ask` does, step by step: files, prompt, model, answer, drawings."""

from __future__ import annotations

import inspect
import mimetypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TextStreamer

from . import PPLlavaConfig, PPLlavaForConditionalGeneration, PPLlavaProcessor, presets
from .preprocessing import read_image

MAX_NEW_TOKENS = 256
# Pillow opens these as images, and they may be clips. A photo of a phone (MPO) or a scan (TIFF) with several is none.
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")


class Exit(IntEnum):
    """The exit codes."""

    OK = 0
    BUG = 1
    USAGE = 2
    MEDIA = 3
    MODEL = 4
    PROMPT = 5
    MEMORY = 6
    INTERRUPTED = 130
    PIPE = 141


class Failure(Exception):
    """Ends the command with an exit code and one sentence."""

    def __init__(self, code: Exit, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch(self) -> torch.dtype | None:
        return None if self is Dtype.AUTO else getattr(torch, self.value)


def sentence(error: BaseException, limit: int = 600) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."


def is_memory(error: BaseException) -> bool:
    """Whether there was too little memory; the CPU's allocator and cuBLAS raise plain RuntimeErrors."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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
        with Image.open(path) as image:
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
        raise Failure(Exit.MEDIA, sentence(error)) from error
    except ValueError as error:
        if kind == "image":
            raise Failure(Exit.MEDIA, sentence(error)) from error
        raise Failure(Exit.USAGE, f"{path}: {sentence(error)}") from error  # the seconds or frames asked for


# The prompt


def fit(config: PPLlavaConfig, processor: PPLlavaProcessor, tokens: int, frames: int) -> None:
    """Set the pooling of model and processor to at most so many visual tokens for each video."""
    if config.pooling not in ("prompt_guided", "adaptive_mean"):
        raise Failure(
            Exit.USAGE, f"--tokens needs a model whose pooling has a budget, got {config.pooling!r}; use fewer --frames"
        )
    config.pooling_output_size = processor.pooling_output_size = list(config.visual_pooling.fit(tokens, frames))


def prompt(processor: PPLlavaProcessor, groups: list[list[Medium]], question: str) -> Any:
    """The inputs of the model: one prompt for each group of files, which holds them in order and then the question."""
    for token in (processor.image_token, processor.video_token):
        if token in question:
            raise Failure(Exit.USAGE, f"QUESTION must not hold {token}, which stands for a file; leave it out")
    conversations = []
    for group in groups:
        blocks = [{"type": medium.kind, medium.kind: medium.source} for medium in group]
        conversations.append([{"role": "user", "content": [*blocks, {"type": "text", "text": question}]}])
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"padding_side": "left"},  # answers continue at the end
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
    name, files = ("the prompt", "fewer files, ") if len(ids) == 1 else ("the longest prompt", "")
    shorten = f"pass fewer --frames or --tokens, {files}or a shorter question"
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


# The model


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
        return PPLlavaConfig.from_pretrained(model), PPLlavaProcessor.from_pretrained(model)


def load_model(
    model: str | None, preset: str | None, config: PPLlavaConfig, device: torch.device, dtype: Dtype
) -> PPLlavaForConditionalGeneration:
    if preset is not None:
        chosen = dtype.torch or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        network, _ = presets.build(preset, dtype=chosen, device=device)
        network.config.pooling_output_size = config.pooling_output_size
        return network
    with loading(model):
        return PPLlavaForConditionalGeneration.from_pretrained(
            model, config=config, dtype=dtype.torch or "auto", device_map=str(device)
        ).eval()


@contextmanager
def loading(model: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_memory(error):
            raise
        raise Failure(Exit.MODEL, f"the model in {model!r} cannot be loaded: {sentence(error)}") from error


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
            super().on_finalized_text(text, stream_end)

    def answers(self, ends: int | list[int] | None) -> list[tuple[str, int]]:
        """(text, number of tokens) of each answer, up to the first of the tokens `ends`; what follows is padding."""
        last = {ends} if isinstance(ends, int) else set(ends or ())
        found = []
        for row in torch.stack(self.steps, dim=1).tolist():  # [N, T]
            count = next((i for i, token in enumerate(row, start=1) if token in last), len(row))
            found.append((self.tokenizer.decode(row[:count], **self.decode_kwargs).strip(), count))
        return found


def visual_tokens(media: list[Medium], features: dict[str, Any]) -> list[int]:
    """Those of each file."""
    counts = {kind: iter([len(x) for x in output.pooler_output]) for kind, output in features.items()}
    return [next(counts[medium.kind]) for medium in media]


# The drawings


def draw_relevance(
    path: Path, groups: list[list[Medium]], features: dict[str, Any], processor: PPLlavaProcessor, question: str
) -> list[str]:
    """Write the relevance of each file, at `path`, or at path-1, path-2, ... for several; where they are."""
    from .relevance import draw, save_mp4, save_png, scale

    drawn = list(_relevance(groups, features))
    targets = []
    for number, (medium, relevance, shared) in enumerate(drawn, start=1):
        in_views = medium.kind == "image" and len(shared) == 1 and processor.image_grid_pinpoints
        cropped = processor.resize_mode == "crop" and not in_views
        frames = draw(_center(medium.frames) if cropped else medium.frames, relevance, scale(shared))
        target = path if len(drawn) == 1 else path.with_stem(f"{path.stem}-{number}")
        times = medium.source.timestamps if medium.kind == "video" else None
        if path.suffix.lower() == ".png":
            save_png(target, frames, times, f"{os.path.basename(medium.path)}: {question}")
        else:
            seconds = float(times[-1] - times[0])
            save_mp4(target, frames, min(max((len(times) - 1) / seconds if seconds else 1, 1), 30))
        targets.append(str(target))
    return targets


def _relevance(groups: list[list[Medium]], features: dict[str, Any]) -> Iterator[tuple[Medium, np.ndarray, np.ndarray]]:
    """Each file, its relevance [T, h, w], and the relevance on whose scale it is drawn."""
    maps = {kind: iter([x.float().cpu().numpy() for x in output.relevance]) for kind, output in features.items()}
    for group in groups:
        images = sum(medium.kind == "image" for medium in group)
        # The only image of a prompt is seen whole, and then in parts, which are not drawn. Several are a list.
        listed = next(maps["image"])[:images] if images else None  # [images, h, w]
        views = iter(listed[:, None] if images else ())
        for medium in group:
            relevance = next(maps["video"] if medium.kind == "video" else views)
            yield medium, relevance, relevance if medium.kind == "video" else listed


def _center(frames: np.ndarray) -> np.ndarray:
    """The square [T, S, S, 3] in the middle of frames [T, H, W, 3], which is what resize_mode "crop" leaves."""
    height, width = frames.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return frames[:, top : top + edge, left : left + edge]


__all__ = [
    "MAX_NEW_TOKENS",
    "Dtype",
    "Exit",
    "Failure",
    "Medium",
    "Stream",
    "draw_relevance",
    "encode",
    "fit",
    "is_memory",
    "kind_of",
    "load_model",
    "load_processor",
    "prompt",
    "read",
    "room",
    "sentence",
    "visual_tokens",
]
