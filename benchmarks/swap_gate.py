"""A compressed model against the one that it was made from, and its pooling against the reference in float64."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppllava.swap import windows
from ppllava.swap.windows import Size
from ppllava_kernels import weighted_pool3d

from . import gate
from .swap_models import KERNEL, Subject
from .video_runs import Sample

FRAMES, ONE = 4, (1, 1, 1)  # of the video that is looked at; windows of one token
RULE = (
    f"on {FRAMES} frames, before anything is timed. Windows of one token must give the stock model's logits at all "
    "positions: max |actual - stock| <= 2 max |moved - stock| + eps(dtype) max |stock|; moved: the stock model, its "
    "pixels moved by the eps of the accumulator. The pooling inside the model against the reference in float64, by the "
    "rule of the ops. The number of visual tokens, in every run, must be that of the windows that fit"
)


class Wrong(Exception):
    """A result that no time may be shown for."""


@contextmanager
def watch(
    model: PreTrainedModel, tokens: int, now: Callable[[], float] = time.perf_counter, sample: Sample | None = None
) -> Iterator[None]:
    """Add up the seconds from pixels to visual tokens in `sample`; Wrong where these are not so many."""
    encode = model.model.get_video_features

    @functools.wraps(encode)  # `generate` looks at its arguments
    def timed(*args: Any, **kwargs: Any):
        start = now()
        output = encode(*args, **kwargs)
        if sample is not None:
            sample.vision += now() - start
        found = sum(x.shape[:-1].numel() for x in output.pooler_output)  # one [.., D] of each video
        if found != tokens:
            raise Wrong(f"{found:,} visual tokens, where {tokens:,} windows fit")
        return output

    with mock.patch.object(model.model, "get_video_features", timed):
        yield


class Gate:
    """What a family's compressed models are compared with; made when the first is."""

    def __init__(self, subject: Subject):
        self.subject = subject

    @cached_property
    def stock(self) -> tuple[Tensor, float]:
        """(logits [1, S, vocabulary] of the stock model, how far they move where the pixels move by an eps)."""
        model, tokens = self.subject.model, self.subject.tokens(FRAMES, ONE)
        given = self.subject.inputs(FRAMES, tokens)
        exact, pixels, errors = logits(model, given, tokens), given["pixel_values_videos"], []
        for seed in range(gate.RUNS_OF_LARGE):
            moved = gate.nudged(pixels, seed).to(pixels.dtype)
            errors.append(gate.relative_error(logits(model, {**given, "pixel_values_videos": moved}, tokens), exact))
        return exact, max(errors)

    def check(self, guided: bool) -> tuple[gate.Verdict, str | None]:
        """(the worse of two verdicts, what is wrong)."""
        verdicts = {"logits with windows of one token": self.same_logits(guided), "pooling": self.same_pooling(guided)}
        what, verdict = max(verdicts.items(), key=lambda item: item[1].error / item[1].limit)
        return verdict, None if verdict.passed else f"{what}: {verdict}"

    def same_logits(self, guided: bool) -> gate.Verdict:
        """A model compressed by windows of one token is the stock model."""
        exact, unavoidable = self.stock
        actual = self._logits(ONE, guided)
        return gate.judge([gate.relative_error(actual, exact)], [unavoidable], [actual.dtype])

    def same_pooling(self, guided: bool) -> gate.Verdict:
        """The op inside the model, and the reference on the same tensors in float64."""
        calls, op = [], windows.weighted_pool3d

        def record(values: Tensor, relevance: Tensor | None, **options: Any) -> Tensor:
            calls.append((values, relevance, options, op(values, relevance, **options)))
            return calls[-1][-1]

        with mock.patch.object(windows, "weighted_pool3d", record):
            self._logits(KERNEL, guided)
        [(values, relevance, options, actual)] = calls

        def reference(values: Tensor, relevance: Tensor | None) -> Tensor:
            return weighted_pool3d(values, relevance, **{**options, "backend": "reference"})

        exact = reference(values.double(), None if relevance is None else relevance.double())
        errors = [gate.relative_error(reference(values, relevance), exact)]
        for seed in range(gate.runs(values.numel())):
            moved = [x if x is None else gate.nudged(x, seed) for x in (values, relevance)]
            errors.append(gate.relative_error(reference(*moved), exact))
        return gate.judge([gate.relative_error(actual, exact)], [max(errors)], [actual.dtype])

    def _logits(self, kernel: Size, guided: bool) -> Tensor:
        tokens = self.subject.tokens(FRAMES, kernel)
        given = self.subject.inputs(FRAMES, tokens, packed=True, guided=guided)
        return logits(self.subject.twin(kernel, guided), given, tokens)


@torch.no_grad()
def logits(model: PreTrainedModel, given: dict[str, Tensor], tokens: int) -> Tensor:
    """[1, S, vocabulary], at all positions, of a model that makes so many visual tokens."""
    with watch(model, tokens):
        return model(**given, use_cache=False).logits
