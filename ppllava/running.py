"""What `ppllava run` does: requests from a file, answers to a file that an interrupted job goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .answers import AnswerFile, Line
from .asking import load_model, load_processor, render, set_budget
from .batching import BatchJob
from .console import Exit, Failure, is_memory, note, progress, sentence
from .options import Dtype, random_weights
from .packing import Outcome
from .quantization import fp8
from .request import Request, RequestError, shown


@dataclass(frozen=True)
class JobSpec:
    """Everything that the answers of a job depend on besides its requests, and where it runs.

    compiled  the vision tower, and on a GPU the decoding step
    fp8       tower and language model multiply in it
    """

    model: str | None
    preset: str | None
    dtype: Dtype
    frames: int | None
    fps: float | None
    tokens: int | None
    max_new_tokens: int | None
    device: str
    compiled: bool = False
    fp8: bool = False
    memory: int | None = None
    threads: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What an answer depends on."""
        given = asdict(self)
        where = ("device", "memory", "threads")
        model = None if self.model is None else os.path.realpath(self.model)
        kept = {key: value for key, value in given.items() if key not in where}
        return {**kept, "model": model, "dtype": self.dtype.value}

    def build(self) -> BatchJob:
        """The model, and all that it needs to answer."""
        config, processor = load_processor(self.model, self.preset)
        set_budget(config, processor, self.tokens)
        if self.frames is not None:
            processor.num_frames = self.frames
        name = self.preset if self.model is None else self.model
        render(processor, name, [["video"], ["image"]], "?")
        network = load_model(self.model, self.preset, config, torch.device(self.device), self.dtype)
        if self.fp8:
            try:
                network = fp8(network)
            except (RuntimeError, ValueError) as error:
                if is_memory(error):
                    raise
                raise Failure(Exit.MODEL, f"--fp8: {sentence(error)}") from error
        options = {}
        if self.compiled:
            network.model.vision_tower.compile()
            if network.device.type == "cuda":  # where transformers compiles the decoding step for it
                options["cache_implementation"] = "static"
        return BatchJob(network, processor, self.max_new_tokens, self.memory, self.threads, options)


def run_job(requests: Path, answers: Path, spec: JobSpec, engine: Any) -> int:
    """Answer the requests of a file; the exit code. `engine(spec, requests, done)` yields the outcomes."""
    lines = read_requests(requests, spec)
    with AnswerFile(answers, requests, spec.settings, lines) as file:
        for place, line in enumerate(lines):
            if line.error:
                file.add(Outcome(place, line.id, error=line.error))
        valid = [place for place, line in enumerate(lines) if line.request is not None]
        done = {n for n, place in enumerate(valid) if place in file.kept}
        if file.kept:
            note(f"{len(file.kept)} of {len(lines)} answers are in {answers}; going on with the others")
        if spec.preset is not None:
            note(random_weights(spec.preset))
        try:
            with progress(len(lines), len(done) + len(lines) - len(valid)) as advance:
                if len(done) < len(valid):
                    # closed, so that its threads and workers end with Ctrl-C, too
                    with closing(engine(spec, [lines[place].request for place in valid], done)) as outcomes:
                        for outcome in outcomes:
                            file.add(replace(outcome, index=valid[outcome.index]))
                            advance(1)
        except KeyboardInterrupt:
            count = f"{len(file.outcomes)} of {len(lines)} requests are done, their answers in {answers}"
            raise Failure(Exit.INTERRUPTED, f"interrupted; {count}; the same command goes on from there") from None
        return file.finish()


def local_engine(spec: JobSpec, requests: list[Request], done: set[int]) -> Iterator[Outcome]:
    """In this process."""
    return spec.build().run(requests, done)


# The requests


def read_requests(path: Path, spec: JobSpec) -> list[Line]:
    """The lines of a file of requests; blank ones are no requests."""
    try:
        with open(path, "rb") as file:
            lines = [_parse(number, text, spec) for number, text in enumerate(file, start=1) if text.strip()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Failure(Exit.USAGE, f"{path}: cannot be read ({reason}); pass a file of JSON lines") from error
    if not any(line.is_object for line in lines):
        why = lines[0].error if lines else "it is empty"
        raise Failure(Exit.USAGE, f"{path}: has no requests, {why}; write one JSON object a line: id, prompt and video")
    first: dict[str | int, int] = {}
    for line in lines:
        if line.id is not None and line.id in first:
            line.error = f"line {line.number}: id {line.id!r} is that of line {first[line.id]}; give each its own"
            line.id, line.request = None, None  # what looks answers up by their ids finds that of the first line
        elif line.id is not None:
            first[line.id] = line.number
    return lines


def _parse(number: int, text: bytes, spec: JobSpec) -> Line:
    line = Line(number)
    try:
        words = text.decode("utf-8-sig" if number == 1 else "utf-8").rstrip()
        given = json.loads(words, object_pairs_hook=_no_twins)
        line.is_object = isinstance(given, dict)
        if line.is_object:
            name = given.get("id")
            line.id = name if isinstance(name, (str, int)) and not isinstance(name, bool) else None
        line.request = _placed(Request.of(given), spec.fps)
        line.digest = hashlib.sha256(json.dumps(asdict(line.request)).encode()).hexdigest()[:16]
    except RequestError as error:
        line.is_object = True
        line.error = f"line {number}: {error}"
    except (ValueError, RecursionError) as error:
        where = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else sentence(error, 100)
        )
        line.error = f"line {number}: must be one JSON object, and is none ({where})"
    return line


def _placed(request: Request, fps: float | None) -> Request:
    """With absolute paths, or the answer would depend on the folder of the call, and with --fps."""
    source = request.source
    for item in source.items:
        if not isinstance(item, str):
            raise RequestError(f"{source.kind} must be the path of a file, got {shown(item)}")
    frames, rate, start, end = source.sampling
    if source.kind == "video" and frames is None and rate is None:
        rate = fps
    items = tuple(map(os.path.abspath, source.items))
    return replace(request, source=replace(source, items=items, sampling=(frames, rate, start, end)))


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise RequestError(f"a key stands there twice, of {', '.join(key for key, _ in pairs)}; leave one out")
    return given


__all__ = ["JobSpec", "local_engine", "read_requests", "run_job"]
