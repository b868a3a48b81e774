"""What a batch job counts with: requests on their way, what belongs together, how much fits."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .request import Request, Source
from .sources import Opened
from .visual_features import PPLlavaVisualFeatures

WINDOW = 128  # requests whose files are opened, and that are packed, together
GIB = 1 << 30
LARGEST = {"cpu": 8}  # requests of one batch, where more of them are no faster
LARGEST_OF_GPU = 256
GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
# Of generate: what leaves greedy answers as they are, what must be so for a single answer, what a batch sets itself.
HARMLESS = {"cache_implementation", "compile_config", "disable_compile", "min_new_tokens", "use_cache"}
SINGLE = {"num_return_sequences": 1, "return_dict_in_generate": False}
OURS = ("inputs", "input_ids", "attention_mask", "max_new_tokens", "max_length", "streamer")


@dataclass
class Item:
    """A request on its way.

    prompt      the rendered chat
    length      tokens of the prompt, visual ones included
    new_tokens  that the answer may have
    row         int64 [length]
    features    of the images or the video, by kind
    """

    index: int
    request: Request
    prompt: str = ""
    length: int = 0
    new_tokens: int = 0
    row: Tensor | None = None
    features: dict[str, PPLlavaVisualFeatures] = field(default_factory=dict)


@dataclass
class Unit:
    """The requests about one source, "video" or "image".

    seen  what the processor takes for it, once the vision tower has run, while requests still need it
    left  requests that do
    """

    items: list[Item]
    kind: str
    opened: Opened | None = None
    seen: list[Any] | None = None
    left: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of request `index`: an answer, or the sentence why there is none."""

    index: int
    id: str | int | None
    answer: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, **({"answer": self.answer} if self.error is None else {"error": self.error})}


def check_options(options: dict[str, Any]) -> None:
    """A ValueError for what `generate` does not know, or what it gives several or other answers for."""
    known = {*GenerationConfig().to_dict(), *inspect.signature(GenerationMixin.generate).parameters} - {
        "self",
        "kwargs",
    }
    several = [name for name, one in SINGLE.items() if options.get(name, one) not in (None, one)]
    if wrong := [name for name in options if name not in known or name in OURS] + several:
        raise ValueError(
            f"{wrong[0]} must be an option of generate that gives one text for each prompt, and is none; leave it out"
        )


def settle(source: Source) -> None:
    """Read images that Pillow opened and has not read: it cannot do so in several threads."""
    for item in source.items:
        for image in item if isinstance(item, (list, tuple)) else [item]:
            if isinstance(image, Image.Image):
                image.load()


def windows(items: Sequence[Item], size: int = WINDOW, frames: int | None = None) -> Iterator[list[Unit]]:
    """Units of equal sources in the order of their first request, in groups of about `size` requests; `frames` of
    videos that name neither frames nor rate."""
    units: dict[tuple, Unit] = {}
    for item in items:
        source = item.request.source
        units.setdefault(source.key(frames), Unit([], source.kind)).items.append(item)
    window, count = [], 0
    for unit in units.values():
        window.append(unit)
        count += len(unit.items)
        if count >= size:
            yield window
            window, count = [], 0
    if window:
        yield window


def decode_answers(tokenizer: Any, rows: Iterable[list[int]], ends: int | list[int] | None) -> list[tuple[str, int]]:
    """(text, number of tokens) of each answer, up to the first of the tokens `ends`; what follows is padding."""
    last = {ends} if isinstance(ends, int) else set(ends or ())
    found = []
    for row in rows:
        count = next((i for i, token in enumerate(row, start=1) if token in last), len(row))
        found.append((tokenizer.decode(row[:count], skip_special_tokens=True).strip(), count))
    return found


def bytes_per_token(text_config: Any, dtype: torch.dtype) -> int:
    """Keys and values of all layers, and the activations of the widest layer in the prefill."""
    heads = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kv = 2 * text_config.num_hidden_layers * (getattr(text_config, "num_key_value_heads", None) or heads) * width
    inner = getattr(text_config, "intermediate_size", None) or 4 * text_config.hidden_size
    return dtype.itemsize * (kv + 6 * text_config.hidden_size + 3 * inner)


def cache_length(needed: int, previous: int) -> int:
    """Positions of a static cache: that of the batch before, unless half of it is enough. A smaller one is compiled, or
    recorded, anew; transformers by itself never makes one."""
    return max(needed, previous) if 2 * needed > previous else needed


def default_memory(device: torch.device) -> int:
    """Whole GiB, so that batches, and how their answers are rounded, hang little on what else runs here."""
    try:
        if device.type == "cuda":
            release(device)
            size = 0.8 * torch.cuda.mem_get_info(device)[0]
        else:
            size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    except (AttributeError, ValueError):  # not Linux
        size = 4 * GIB
    return max(1, int(size / GIB)) * GIB


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


__all__ = [
    "GREEDY",
    "HARMLESS",
    "LARGEST",
    "LARGEST_OF_GPU",
    "WINDOW",
    "Item",
    "Outcome",
    "Unit",
    "bytes_per_token",
    "cache_length",
    "check_options",
    "decode_answers",
    "default_memory",
    "release",
    "settle",
    "windows",
]
