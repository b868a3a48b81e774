"""Batch inference: many questions about many files, packed by tokens, each file encoded once."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from .compat import PREVIOUS_CACHE
from .console import is_fatal, is_memory, sentence
from .packing import (
    GREEDY,
    HARMLESS,
    LARGEST,
    LARGEST_OF_GPU,
    Item,
    Outcome,
    Unit,
    bytes_per_token,
    cache_length,
    check_options,
    decode_answers,
    default_memory,
    release,
    settle,
    windows,
)
from .request import MAX_NEW_TOKENS, Request
from .sources import Loads, open_source
from .turns import render_turn, special_tokens
from .visual_features import MODALITIES, PPLlavaVisualFeatures

if TYPE_CHECKING:
    from .modeling_ppllava import PPLlavaForConditionalGeneration
    from .processing_ppllava import PPLlavaProcessor


class BatchWarning(UserWarning):
    """A batch did not fit; it was halved, and so are those after it."""


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
        generate_options: for `generate`, for example `cache_implementation="static"`; greedy where they do not say how.

    Raises:
        TypeError: for one request that is in no list.
        ValueError: for `memory` or `workers` below 1, options that `generate` does not know or that give no single
            answer, and for a model and a processor that do not belong together. What is wrong with a request is in its
            answer.
    """
    if isinstance(requests, Mapping):
        raise TypeError("requests must be several requests, got one mapping; pass a list of them, [request]")
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
        options = dict(generate_options or {})
        check_options(options)
        if model.config.visual_pooling != processor.visual_pooling:
            raise ValueError(
                f"model and processor must pool alike, got {model.config.visual_pooling} and "
                f"{processor.visual_pooling}; set the same fields on model.config and processor"
            )
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.workers = workers or min(8, max(1, (os.cpu_count() or 2) // 2))
        self.memory = memory or default_memory(model.device)
        self.budget = max(1, self.memory // bytes_per_token(model.config.text_config, model.dtype))  # padded tokens
        self.options = {**({} if "generation_config" in options else GREEDY), **options}
        # An answer that is cut from a longer one is its own only where tokens come one by one, the likeliest.
        self.one_length = not options.keys() <= HARMLESS
        self.static = self.options.get("cache_implementation") == "static"
        self._said: set[str] = set()

    def run(self, requests: Sequence[Any], done: Collection[int] = ()) -> Iterator[Outcome]:
        """The outcomes of all requests but those at the indices `done`. These only take their places in the batches,
        so that the others are computed, and rounded, as they would be in one go."""
        items: list[Item] = []
        for index, given in enumerate(requests):
            try:
                request = given if isinstance(given, Request) else Request.of(given)
                settle(request.source)
                items.append(Item(index, request))
            except Exception as error:
                if index not in done:
                    name = given.get("id") if isinstance(given, Mapping) else getattr(given, "id", None)
                    name = name if isinstance(name, (str, int)) and not isinstance(name, bool) else None
                    yield Outcome(index, name, error=sentence(error))
        chunk = self.model.config.vision_chunk
        pool = ThreadPoolExecutor(self.workers, "ppllava-files")
        try:
            for units in windows(items, frames=self.processor.num_frames):
                yield from self._window(pool, units, done)
        finally:
            pool.shutdown(cancel_futures=True)
            self.model.config.vision_chunk = chunk

    def _window(self, pool: ThreadPoolExecutor, units: list[Unit], done: Collection[int]) -> Iterator[Outcome]:
        if all(item.index in done for unit in units for item in unit.items):
            return
        sources = [unit.items[0].request.source for unit in units]
        opening = deque(pool.submit(open_source, self.model, self.processor, x, self.memory) for x in sources)
        for unit in units:
            yield from (outcome for outcome in self._measure(unit, opening.popleft()) if outcome.index not in done)
        of = {item.index: unit for unit in units for item in unit.items}
        batches = list(self._batches([item for unit in units for item in unit.items]))
        batches = [some for some in batches if not all(item.index in done for item in some)]
        wanted = {item.index for some in batches for item in some}
        for unit in units:
            unit.items = [item for item in unit.items if item.index in wanted]
            unit.left = len(unit.items)
        self._forget_cache()
        order = {id(of[item.index]): of[item.index] for some in batches for item in some}  # by first need
        loads = Loads(pool, self.workers + 1, [(key, unit.opened) for key, unit in order.items()])
        failed: dict[int, Outcome] = {}
        for some in batches:
            for item in some:
                unit = of[item.index]
                if unit.opened is not None:
                    failed.update((outcome.index, outcome) for outcome in self._encode(unit, loads))
                if unit.seen is not None and item.row is None and item.index not in failed:
                    failed.update((outcome.index, outcome) for outcome in self._look(unit, [item]))
                unit.left -= 1
                if not unit.left:
                    unit.seen = None
            outcomes = [failed.pop(item.index) for item in some if item.index in failed]
            ready = [item for item in some if item.row is not None]
            outcomes += self._answer(ready)
            for item in ready:
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
                item.prompt = render_turn(
                    self.processor, [unit.opened.kind] * unit.opened.placeholders, item.request.prompt
                )
                options = special_tokens(self.processor, item.prompt)
                ids = self.processor.tokenizer(item.prompt, **options)["input_ids"]
                item.length = len(ids) - unit.opened.placeholders + unit.opened.tokens
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

    def _batches(self, items: list[Item]) -> Iterator[list[Item]]:
        """Requests that share a batch, those of long answers first, then those of long prompts: as many as the budget
        of padded tokens holds, and one in any case."""
        largest = LARGEST.get(self.model.device.type, LARGEST_OF_GPU)
        limit = self.model.config.context_length or math.inf
        some: list[Item] = []
        previous = held = 0  # positions of a static cache, before this batch and with it
        for item in sorted(items, key=lambda item: (self._kind(item), item.length), reverse=True):
            grown = [*some, item]
            tokens = max(each.length for each in grown) + max(each.new_tokens for each in grown)
            size = cache_length(tokens, previous) if self.static else tokens
            full = len(some) == largest or len(grown) * size > self.budget or tokens > limit
            if some and (full or self._kind(item) != self._kind(some[0])):
                yield some
                some, previous, tokens = [], held, item.length + item.new_tokens
            some.append(item)
            held = cache_length(tokens, previous)
        if some:
            yield some

    def _kind(self, item: Item) -> int:
        """Answers of the same kind share a batch: all wait for the longest, so none is twice as long as another."""
        return item.new_tokens if self.one_length else item.new_tokens.bit_length()

    @torch.no_grad()
    def _encode(self, unit: Unit, loads: Loads) -> list[Outcome]:
        """Run the vision tower over a source; the outcomes of requests about it that fail with it."""
        before, failed = self.model.config.vision_chunk, []
        try:
            loaded = loads.take(id(unit))
            while not self._encoded(unit, loaded, failed):
                release(self.model.device)
                loaded = unit.opened.load()
        except Exception as error:
            if is_fatal(error):
                raise
            if is_memory(error):  # it is not the chunks
                self.model.config.vision_chunk = before
            failed = [self._failed(item, error) for item in unit.items if item.row is None]
            unit.seen = None
        unit.opened = None
        return failed

    def _encoded(self, unit: Unit, loaded: Any, failed: list[Outcome]) -> bool:
        """Whether the vision tower had memory enough; where it had not, it sees fewer frames at once from then on."""
        try:
            unit.seen = unit.opened.encode(loaded)
            if unit.opened.looks_at_once(len(unit.items)):
                failed[:] = self._look(unit, unit.items)
                unit.seen = None
            return True
        except Exception as error:
            frames = min(self.model.model.vision_chunk_frames(self.model.device), unit.opened.frames)
            if not is_memory(error) or frames == 1:
                raise
            self._say("the vision tower", f"{frames} frames at once", error)
            self.model.config.vision_chunk = frames // 2
            return False

    @torch.no_grad()
    def _look(self, unit: Unit, items: list[Item]) -> list[Outcome]:
        """Visual tokens and input ids of these requests about a source; the outcomes of those without."""
        failed = []
        for item in items:
            try:
                media = {f"{unit.kind}s": unit.seen, **special_tokens(self.processor, item.prompt)}
                inputs = self.processor(text=item.prompt, guide_text=item.request.prompt, **media)
                row = inputs.pop("input_ids")[0]
                inputs.pop("attention_mask")
                item.features = self.model.get_media_features(**inputs.to(self.model.device, self.model.dtype))
                item.row = row
            except Exception as error:
                if is_fatal(error) or (unit.kind == "image" and is_memory(error)):  # whose tower runs in here
                    raise
                failed.append(self._failed(item, error))
        return failed

    def _answer(self, items: list[Item]) -> list[Outcome]:
        """Of each item, in order."""
        if not items:
            return []
        padded = len(items) * self._positions(items)
        if padded <= self.budget or len(items) == 1:
            try:
                return [Outcome(item.index, item.request.id, text) for item, text in zip(items, self._generate(items))]
            except Exception as error:
                if is_fatal(error):
                    raise
                if len(items) == 1:
                    return [self._failed(items[0], error)]
                if is_memory(error):
                    self._say("generate", f"{len(items)} prompts of {padded} tokens", error)
                    self.budget = padded // 2
            release(self.model.device)
        half = len(items) // 2
        return [*self._answer(items[:half]), *self._answer(items[half:])]

    def _positions(self, items: list[Item]) -> int:
        """Of the key-value cache of a batch."""
        needed = max(item.length for item in items) + max(item.new_tokens for item in items)
        return cache_length(needed, getattr(self.model, PREVIOUS_CACHE, 0)) if self.static else needed

    def _forget_cache(self) -> None:
        if self.static and hasattr(self.model, PREVIOUS_CACHE):
            setattr(self.model, PREVIOUS_CACHE, -1)

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
        if self._positions(items) < getattr(self.model, PREVIOUS_CACHE, 0):
            self._forget_cache()
        new = max(item.new_tokens for item in items)
        ids = padded["input_ids"]  # [N, S]
        output = self.model.generate(
            input_ids=ids,
            attention_mask=padded["attention_mask"],
            mm_encoder_outputs=features,
            max_new_tokens=new,
            **self.options,
        )[:, ids.shape[1] :]  # [N, new]
        if len(output) != len(items):
            raise ValueError(f"generate must give one answer to each prompt, got {len(output)} for {len(items)}")
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


__all__ = ["BatchJob", "BatchWarning", "batch"]
