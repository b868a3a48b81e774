"""What `ppllava run` does: requests from a file, answers to a file that an interrupted job goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .asking import Dtype, check_template, load_model, load_processor, set_budget
from .batching import BatchJob, Outcome
from .console import Exit, Failure, note, progress, sentence
from .request import Request, RequestError


@dataclass(frozen=True)
class JobSpec:
    """Everything that the answers of a job depend on besides its requests, and where it runs."""

    model: str | None
    preset: str | None
    dtype: Dtype
    frames: int | None
    fps: float | None
    tokens: int | None
    max_new_tokens: int | None
    device: str
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
        check_template(processor, name, [["video"], ["image"]], "?")
        network = load_model(self.model, self.preset, config, torch.device(self.device), self.dtype)
        return BatchJob(network, processor, self.max_new_tokens, self.memory, self.threads)


@dataclass
class Line:
    """One line of the file of requests: what it asks, or what is wrong with it."""

    number: int
    id: str | int | None = None
    request: Request | None = None
    digest: str = ""
    error: str = ""


def run_job(requests: Path, answers: Path, spec: JobSpec, engine: Any) -> int:
    """Answer the requests of a file; the exit code. `engine(spec, requests, done)` yields the outcomes."""
    lines = read_requests(requests, spec)
    if not lines:
        raise Failure(Exit.USAGE, f"{requests}: has no requests; write one JSON object a line: id, prompt and video")
    with AnswerFile(answers, requests, spec.settings, lines) as file:
        for place, line in enumerate(lines):
            if line.error:
                file.add(Outcome(place, line.id, error=line.error))
        valid = [place for place, line in enumerate(lines) if line.request is not None]
        done = {n for n, place in enumerate(valid) if place in file.kept}
        if file.kept:
            note(f"{len(file.kept)} of {len(lines)} answers are in {answers}; going on with the others")
        try:
            with progress(len(lines)) as advance:
                advance(len(done) + len(lines) - len(valid))
                if len(done) < len(valid):
                    for outcome in engine(spec, [lines[place].request for place in valid], done):
                        place = valid[outcome.index]
                        file.add(Outcome(place, outcome.id, outcome.answer, outcome.error))
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
    except OSError as error:
        raise Failure(Exit.USAGE, f"{path}: cannot be read ({error.strerror}); pass a file of JSON lines") from error
    first: dict[str | int, int] = {}
    for line in lines:
        if line.request is None:
            continue
        if line.id in first:
            line.error = f"line {line.number}: id {line.id!r} is that of line {first[line.id]}; give each its own"
            line.request = None
        first.setdefault(line.id, line.number)
    return lines


def _parse(number: int, text: bytes, spec: JobSpec) -> Line:
    line = Line(number)
    try:
        given = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=_no_twins)
        if isinstance(given, dict):
            name = given.get("id")
            line.id = name if isinstance(name, (str, int)) and not isinstance(name, bool) else None
            if spec.fps is not None and "video" in given and given.get("frames") is None and given.get("fps") is None:
                given["fps"] = spec.fps
        line.request = Request.of(given)
        line.digest = hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]
    except RequestError as error:
        line.error = f"line {number}: {error}"
    except (ValueError, RecursionError) as error:
        line.error = f"line {number}: must be one JSON object, and is none ({sentence(error, 100)})"
    return line


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    if len(given) < len(pairs):
        raise RequestError(f"a key stands there twice, of {', '.join(key for key, _ in pairs)}; leave one out")
    return given


# The answers


class AnswerFile:
    """The answers of a job: a line each as soon as it is there, and at the end all in the order of the requests.

    Beside it lies `<name>.job`, with the settings and a digest of each request, so that the next run keeps an answer
    only where nothing that it depends on has changed. Requests without an answer are tried again.

    kept      places of the requests that were answered before
    outcomes  place -> outcome, of all that are done
    """

    def __init__(self, path: Path, requests: Path, settings: dict[str, Any], lines: list[Line]) -> None:
        if path.exists() and requests.exists() and path.samefile(requests):
            raise Failure(Exit.USAGE, f"-o must be another file than the requests, got {path} for both")
        self.path, self.settings, self.lines = path, settings, lines
        self.job = path.with_name(path.name + ".job")
        self.kept: set[int] = set()
        self.outcomes: dict[int, Outcome] = {}
        self._stack, self._file = ExitStack(), None

    def __enter__(self) -> AnswerFile:
        with self._stack as stack, writing(self.path):
            _lock(stack.enter_context(open(self.job, "a", encoding="utf-8")), self.path)
            self._resume()
            digests = {json.dumps(line.id): line.digest for line in self.lines if line.request is not None}
            self._rewrite()
            draft = stack.enter_context(open(_draft(self.job), "w", encoding="utf-8"))
            _lock(draft, self.path)  # before it takes the place of the one that is locked
            draft.write(json.dumps({"settings": self.settings, "requests": digests}))
            draft.flush()
            os.replace(draft.name, self.job)
            self._file = stack.enter_context(open(self.path, "a", encoding="utf-8"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, outcome: Outcome) -> None:
        """One more; `index` is its place."""
        if outcome.error is not None:
            note(outcome.error if outcome.id is None else f"{outcome.id}: {outcome.error}")
        self.outcomes[outcome.index] = outcome
        with writing(self.path):
            self._file.write(_line(outcome))
            self._file.flush()

    def finish(self) -> int:
        """All in the order of the requests; the exit code."""
        with writing(self.path):
            self._rewrite()
        failed = sum(outcome.error is not None for outcome in self.outcomes.values())
        note(f"{len(self.outcomes) - failed} answers and {failed} errors in {self.path}")
        return Exit.MEDIA if failed else Exit.OK

    def _rewrite(self) -> None:
        _replace(self.path, "".join(_line(outcome) for _, outcome in sorted(self.outcomes.items())))

    def _resume(self) -> None:
        """Take over the answers of the last run that still hold."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        try:
            last = json.loads(self.job.read_text())
            settings, digests = last["settings"], last["requests"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Failure(
                Exit.USAGE,
                f"-o: {self.path} exists, and its {self.job.name} does not tell what it answers; delete it, or choose "
                "another file",
            ) from error
        if changed := [key for key in self.settings if self.settings[key] != settings.get(key)]:
            was = ", ".join(f"{key} {settings.get(key)}" for key in changed)
            raise Failure(
                Exit.USAGE,
                f"-o: {self.path} holds answers with other settings ({was}); pass these, delete it, or choose another "
                "file",
            )
        places = {json.dumps(line.id): place for place, line in enumerate(self.lines) if line.request is not None}
        for text in self.path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # a line that was cut in its middle
                answer = json.loads(text)
                key, words = json.dumps(answer["id"]), answer["answer"]
                place = places[key]
                if isinstance(words, str) and digests.get(key) == self.lines[place].digest:
                    self.kept.add(place)
                    self.outcomes[place] = Outcome(place, answer["id"], words)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(
            Exit.OUTPUT, f"{path} cannot be written ({error.strerror or error}); free some space, or write elsewhere"
        ) from error


def _lock(file: IO[str], path: Path) -> None:
    """Two jobs with one file of answers would mix them. Held until the file is closed."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not Unix
        pass
    except BlockingIOError:
        raise Failure(Exit.USAGE, f"-o: another `ppllava run` writes {path}; wait, or choose another file") from None


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    _draft(path).write_text(text, encoding="utf-8")
    os.replace(_draft(path), path)


def _line(outcome: Outcome) -> str:
    text = json.dumps(outcome.as_dict(), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair in an id
        text = json.dumps(outcome.as_dict())
    return text + "\n"


__all__ = ["AnswerFile", "JobSpec", "local_engine", "read_requests", "run_job"]
