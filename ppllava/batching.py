"""Batch inference: many questions about many files, packed by tokens, each file encoded once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .console import is_memory, sentence
from .request import Request, RequestError
from .sources import Loads, Opened, open_source
from .visual_features import MODALITIES, PPLlavaVisualFeatures

if TYPE_CHECKING:
    from .modeling_ppllava import PPLlavaForConditionalGeneration
    from .processing_ppllava import PPLlavaProcessor

MAX_NEW_TOKENS = 256
WINDOW = 128  # requests whose files are opened, and that are packed, together
GIB = 1 << 30
LARGEST = {"cpu": 8}  # requests of one batch, where more of them are no faster
LARGEST_OF_GPU = 256


class BatchWarning(UserWarning):
    """A batch did not fit; it was halved, and so are those after it."""


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
    """The requests about one source.

    encoded  what the processor takes for it, or the error
    left     requests that still need it
    """

    items: list[Item]
    opened: Opened | None = None
    encoded: list[Any] | Exception | None = None
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


def batch(
    model: PPLlavaForConditionalGeneration,
    processor: PPLlavaProcessor,
    requests: Iterable[Any],
    *,
    max_new_tokens: int | None = None,
    memory: int | None = None,
    workers: int | None = None,
    **generate_options: Any,
) -> Iterator[dict[str, Any]]:
    """Answer many requests: `{"id": ..., "answer": ...}`, or `{"id": ..., "error": ...}`, in their order.

        requests = [{"id": 1, "video": "a.mp4", "prompt": "What happens?"}, {"id": 2, "image": "b.png", "prompt": ...}]
        for answer in ppllava.batch(model, processor, requests):
            ...

    Files are decoded ahead in threads. A video that several requests ask about, with the same frames, goes through the
    vision tower once. Prompts of like length share a batch, as many as fit into `memory`; a batch that does not fit
    after all is halved, with one :class:`BatchWarning`. What fails fails alone: the others are answered.

    Args:
        model, processor: of one checkpoint or preset. `pooling_max_tokens` of both bounds the tokens of each video.
        requests: mappings with `id`, `prompt`, and one of `video`, `image` and `images`: paths, or what `processor`
            takes; for the file of a video optionally `frames` (default: `processor.num_frames`) or `fps`, `start` and
            `end` in seconds; `max_new_tokens`.
        max_new_tokens: where a request names none; default 256, or what the context leaves.
        memory: bytes that the key-value cache and the activations of one batch may take, and the features of one video;
            default: 80 % of what is free on a GPU, a quarter of all there is on a CPU.
        workers: threads that open and decode files; default: half of the cores, at most 8.
        generate_options: for `generate`, for example `cache_implementation="static"`; greedy by default.

    Raises:
        ValueError: for `memory` or `workers` below 1. What is wrong with a request is in its answer.
    """
    job = BatchJob(model, processor, max_new_tokens, memory, workers, generate_options)
    given = list(requests)

    def answers() -> Iterator[dict[str, Any]]:
        ready, following = {}, 0
        for outcome in job.run(given):
            ready[outcome.index] = outcome
            while following in ready:
                yield ready.pop(following).as_dict()
                following += 1

    return answers()


class BatchJob:
    """The work of :func:`batch`, whose outcomes come as they are there."""

    def __init__(
        self,
        model: PPLlavaForConditionalGeneration,
        processor: PPLlavaProcessor,
        max_new_tokens: int | None = None,
        memory: int | None = None,
        workers: int | None = None,
        generate_options: dict[str, Any] | None = None,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("memory", memory), ("workers", workers)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}; None is the default")
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.workers = workers or min(8, max(1, (os.cpu_count() or 2) // 2))
        self.memory = memory or default_memory(model.device)
        self.budget = max(1, self.memory // bytes_per_token(model.config.text_config, model.dtype))  # padded tokens
        self.options = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, **(generate_options or {})}
        self._said: set[str] = set()

    def run(self, requests: Sequence[Any], done: Collection[int] = ()) -> Iterator[Outcome]:
        """The outcomes of all requests but those at the indices `done`. These only take their places in the batches,
        so that the others are computed, and rounded, as they would be in one go."""
        items: list[Item] = []
        for index, given in enumerate(requests):
            try:
                items.append(Item(index, given if isinstance(given, Request) else Request.of(given)))
            except RequestError as error:
                if index not in done:
                    name = given.get("id") if isinstance(given, dict) else None
                    name = name if isinstance(name, (str, int)) else None
                    yield Outcome(index, name, error=str(error))
        chunk = self.model.config.vision_chunk
        pool = ThreadPoolExecutor(self.workers, "ppllava-files")
        try:
            for units in windows(items):
                yield from self._window(pool, units, done)
        finally:
            pool.shutdown(cancel_futures=True)
            self.model.config.vision_chunk = chunk

    def _window(self, pool: ThreadPoolExecutor, units: list[Unit], done: Collection[int]) -> Iterator[Outcome]:
        if all(item.index in done for unit in units for item in unit.items):
            return
        sources = [unit.items[0].request.source for unit in units]
        opening = [pool.submit(open_source, self.model, self.processor, source, self.memory) for source in sources]
        for unit, opened in zip(units, opening):
            yield from (outcome for outcome in self._measure(unit, opened) if outcome.index not in done)
        batches = [some for some in self._batches(units) if not all(item.index in done for _, item in some)]
        needed: dict[int, Unit] = {}
        for unit, _ in (pair for some in batches for pair in some):
            needed.setdefault(id(unit), unit).left += 1
        loads = Loads(pool, self.workers + 1, [(key, unit.opened) for key, unit in needed.items()])
        for some in batches:
            outcomes, encoded = [], []
            for unit, item in some:
                failed = self._encode(unit, item, loads)
                if failed is None:
                    encoded.append(item)
                else:
                    outcomes.append(failed)
            outcomes += self._answer(encoded)
            for item in encoded:
                item.row, item.features = None, {}  # the tokens of thousands of videos would fill the memory
            yield from (outcome for outcome in outcomes if outcome.index not in done)

    def _measure(self, unit: Unit, future: Future) -> list[Outcome]:
        """The outcomes of those requests of a unit that cannot be answered; the others know their lengths."""
        try:
            unit.opened = future.result()
        except Exception as error:
            failed = [self._failed(item, error) for item in unit.items]
            unit.items = []
            return failed
        failed, fit = [], []
        limit = self.model.config.context_length
        for item in unit.items:
            try:
                item.prompt = self._prompt(unit, item)
                text = len(self.processor.tokenizer(item.prompt)["input_ids"]) - unit.opened.placeholders
                item.length = text + unit.opened.tokens
                asked = item.request.max_new_tokens or self.max_new_tokens
                item.new_tokens = asked or MAX_NEW_TOKENS
                if limit is not None:
                    room = limit - item.length
                    if room < (asked or 1):
                        raise ValueError(
                            f"the prompt of {item.length} tokens, {unit.opened.tokens} of them visual, and "
                            f"max_new_tokens {asked or 1} must fit into the {limit} of the model; ask for fewer frames "
                            "or tokens"
                        )
                    item.new_tokens = min(item.new_tokens, room)
                fit.append(item)
            except Exception as error:
                failed.append(self._failed(item, error))
        unit.items = fit
        return failed

    def _prompt(self, unit: Unit, item: Item) -> str:
        blocks = [{"type": unit.opened.kind} for _ in range(unit.opened.placeholders)]
        turns = [{"role": "user", "content": [*blocks, {"type": "text", "text": item.request.prompt}]}]
        return self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)

    def _batches(self, units: list[Unit]) -> Iterator[list[tuple[Unit, Item]]]:
        """Requests that share a batch: longest first, the requests of a unit side by side, as many as the budget of
        padded tokens holds, and one in any case."""
        largest = LARGEST.get(self.model.device.type, LARGEST_OF_GPU)
        some: list[tuple[Unit, Item]] = []
        length = new = 0
        for unit in sorted((unit for unit in units if unit.items), key=lambda unit: -max(map(_tokens, unit.items))):
            for item in sorted(unit.items, key=_tokens, reverse=True):
                length, new = max(length, item.length), max(new, item.new_tokens)
                if some and (len(some) == largest or (len(some) + 1) * (length + new) > self.budget):
                    yield some
                    some, length, new = [], item.length, item.new_tokens
                some.append((unit, item))
        if some:
            yield some

    @torch.no_grad()
    def _encode(self, unit: Unit, item: Item, loads: Loads) -> Outcome | None:
        """Visual tokens and input ids of a request; the outcome where there are none."""
        try:
            if unit.encoded is None:
                unit.encoded = self._see(unit, loads)
            if isinstance(unit.encoded, Exception):
                raise unit.encoded
            inputs = self.processor(
                text=item.prompt, guide_text=item.request.prompt, **{f"{unit.opened.kind}s": unit.encoded}
            )
            item.row = inputs.pop("input_ids")[0]
            inputs.pop("attention_mask")
            item.features = self.model.get_media_features(**inputs.to(self.model.device, self.model.dtype))
        except Exception as error:
            return self._failed(item, error)
        finally:
            unit.left -= 1
            if not unit.left:
                unit.encoded = unit.opened = None
        return None

    def _see(self, unit: Unit, loads: Loads) -> list[Any] | Exception:
        """The video after the vision tower, or the images; what went wrong, for all requests about it."""
        try:
            loaded = loads.take(id(unit))
            while (frames := self._encoded(unit, loaded)) is None:
                release(self.model.device)
                loaded = unit.opened.load()
            return frames
        except Exception as error:
            return error.with_traceback(None)  # which would keep its tensors

    def _encoded(self, unit: Unit, loaded: Any) -> list[Any] | None:
        """None where the tower runs out of memory; from then on it sees half as many frames at once."""
        try:
            return unit.opened.encode(loaded)
        except Exception as error:
            frames = self.model.model.vision_chunk_frames(self.model.device)
            if not is_memory(error) or frames == 1:
                raise
            self._say("the vision tower", f"{frames} frames at once", error)
            self.model.config.vision_chunk = frames // 2
            return None

    def _answer(self, items: list[Item]) -> list[Outcome]:
        """Of each item, in order."""
        if not items:
            return []
        padded = len(items) * (max(item.length for item in items) + max(item.new_tokens for item in items))
        if padded <= self.budget or len(items) == 1:
            try:
                return [Outcome(item.index, item.request.id, text) for item, text in zip(items, self._generate(items))]
            except Exception as error:
                if "CUDA error" in str(error):  # nothing runs on this GPU any more
                    raise
                if len(items) == 1:
                    return [self._failed(items[0], error)]
                if is_memory(error):
                    self._say("generate", f"{len(items)} prompts of {padded} tokens", error)
                    self.budget = padded // 2
            release(self.model.device)
        half = len(items) // 2
        return [*self._answer(items[:half]), *self._answer(items[half:])]

    @torch.no_grad()
    def _generate(self, items: list[Item]) -> list[str]:
        tokenizer, device = self.processor.tokenizer, self.model.device
        padded = tokenizer.pad(
            {"input_ids": [item.row.tolist() for item in items]}, padding_side="left", return_tensors="pt"
        ).to(device)
        features = {}
        for kind in MODALITIES:
            if rows := [row for item in items if kind in item.features for row in item.features[kind].pooler_output]:
                features[kind] = PPLlavaVisualFeatures(pooler_output=tuple(rows))
        new = max(item.new_tokens for item in items)
        ids = padded["input_ids"]  # [N, S]
        output = self.model.generate(
            input_ids=ids,
            attention_mask=padded["attention_mask"],
            mm_encoder_outputs=features,
            max_new_tokens=new,
            **self.options,
        )[:, ids.shape[1] :]  # [N, new]
        rows = [row[: item.new_tokens] for row, item in zip(output.tolist(), items)]
        return [text for text, _ in decode_answers(tokenizer, rows, self.model.generation_config.eos_token_id)]

    def _failed(self, item: Item, error: BaseException) -> Outcome:
        text = sentence(error)
        if is_memory(error):
            text = f"out of memory even alone ({sentence(error, 100)}); ask for fewer frames, tokens or max_new_tokens"
        return Outcome(item.index, item.request.id, error=text)

    def _say(self, what: str, size: str, error: BaseException) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(
                f"{what} ran out of memory with {size} ({sentence(error, 60)}); halved, from here on",
                BatchWarning,
                stacklevel=2,
            )


def windows(items: Sequence[Item], size: int = WINDOW) -> Iterator[list[Unit]]:
    """Units of equal sources in the order of their first request, in groups of about `size` requests."""
    units: dict[tuple, Unit] = {}
    for item in items:
        units.setdefault(item.request.source.key, Unit([])).items.append(item)
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


def default_memory(device: torch.device) -> int:
    """Whole GiB, so that batches, and how their answers are rounded, do not hang on what else runs here."""
    try:
        if device.type == "cuda":
            release(device)
            size = 0.8 * torch.cuda.mem_get_info(device)[0]
        else:
            size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4
    except (AttributeError, ValueError):  # not Linux
        size = 4 * GIB
    return max(1, int(size / GIB)) * GIB


def _tokens(item: Item) -> int:
    return item.length + item.new_tokens


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


__all__ = ["MAX_NEW_TOKENS", "BatchJob", "BatchWarning", "Outcome", "batch", "decode_answers"]
