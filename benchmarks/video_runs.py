"""One `generate` of a job with a clock inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from .load import Load, watch
from .video_models import Job


@dataclass
class Sample:
    """Seconds of one `generate`, and what came out of it."""

    vision: float = 0.0
    projector: float = 0.0
    first_token: float = 0.0
    token: float | None = None
    generate: float = 0.0
    visual_tokens: int = 0
    output: Any = field(default=None, repr=False)
    load: Load = field(default_factory=Load)  # of other processes meanwhile
    start: float = 0.0  # of the first call of a shape beyond those of a second one

    @property
    def prefill(self) -> float:
        return self.first_token - self.vision - self.projector


class FirstToken(StoppingCriteria):
    """Never stops; notes when the first token is there."""

    def __init__(self, now: Callable[[], float]):
        self.now, self.time = now, None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if self.time is None:
            self.time = self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def clock(device: torch.device | str) -> Callable[[], float]:
    """Seconds, after all that was launched on the device."""
    if torch.device(device).type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@contextmanager
def inside(job: Job, now: Callable[[], float], sample: Sample) -> Iterator[None]:
    """Add up the seconds in the tower and from there to visual tokens, and count those."""
    inner, starts = job.model.model, []

    def start(module: torch.nn.Module, inputs: Any) -> None:
        starts.append(now())

    def end(part: str) -> Callable[..., None]:
        def add(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            setattr(sample, part, getattr(sample, part) + now() - starts.pop())

        return add

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tokens = output[0] if isinstance(output, tuple) else [output]  # one [.., D] per clip
        sample.visual_tokens += sum(rows.shape[:-1].numel() for rows in tokens)

    parts = [(inner.vision_tower, "vision"), (inner.multi_modal_projector, "projector")]
    parts.append((inner.guide.text_model if job.ours else inner.vision_resampler, "projector"))
    hooks = [inner.multi_modal_projector.register_forward_hook(count)]
    for module, part in parts:
        hooks += [module.register_forward_pre_hook(start), module.register_forward_hook(end(part))]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def generate(job: Job, inputs: dict[str, Tensor], new_tokens: int, parts: bool = True, **kwargs: Any) -> Sample:
    """One greedy `generate` of exactly `new_tokens`.

    parts: time vision and projector inside it, which on a GPU waits for each of them and so costs time itself.
    """
    now = clock(job.videos.device)
    sample, first = Sample(), FirstToken(now)
    job.model._previous_max_cache_length = -1  # or a static cache would be as long as the longest one before
    clock_inside = now if parts else time.perf_counter
    with watch(sample.load), job.entrant.change(), inside(job, clock_inside, sample):
        start = now()
        if job.streamed:
            encoded = job.videos.stream(job.model)
            sample.vision = (now() if parts else time.perf_counter()) - start  # pixels are normalised on the way
            inputs = job.videos.ask(encoded)
            del encoded
        sample.output = job.model.generate(
            **inputs,
            **job.entrant.settings,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([first]),
            **kwargs,
        )
        sample.generate = now() - start
    sample.first_token = first.time - start
    if new_tokens > 1:
        sample.token = (sample.generate - sample.first_token) / (new_tokens - 1)
    return sample
