"""What `ppllava run` does: requests from a file, answers to a file that an interrupted job goes on with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from .asking import Dtype, check_template, load_model, load_processor, set_budget
from .batching import BatchJob
from .console import Exit, Failure, is_memory, note, progress, sentence
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
        check_template(processor, name, [["video"], ["image"]], "?")
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


@dataclass
class Line:
    """One line of the file of requests: what it asks, or what is wrong with it."""

    number: int
    is_object: bool = False
    id: str | int | None = None
    request: Request | None = None
    digest: str = ""
    error: str = ""


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
        try:
            with progress(len(lines)) as advance:
                advance(len(done) + len(lines) - len(valid))
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


# The answers


class AnswerFile:
    """The answers of a job: a line each as soon as it is there, and at the end all in the order of the requests.

    Beside it lies `<name>.job`, with the settings and a digest of each request, so that the next run keeps an answer
    only where nothing that it depends on has changed. Requests without an answer are tried again.

    kept      places of the requests that were answered before
    outcomes  place -> outcome, of all that are done
    """

    def __init__(self, path: Path, requests: Path, settings: dict[str, Any], lines: list[Line]) -> None:
        self.path = Path(os.path.realpath(path)) if os.path.islink(path) else path  # a link stays one
        self.job = self.path.parent / f"{self.path.name}.job"
        self.requests, self.settings, self.lines = requests, settings, lines
        self.kept: set[int] = set()
        self.outcomes: dict[int, Outcome] = {}
        self._stack, self._file = ExitStack(), None

    def __enter__(self) -> AnswerFile:
        with self._stack as stack, writing(self.path):
            self._check_place()
            lock = stack.enter_context(open(self.job, "a", encoding="utf-8"))
            _lock(lock, self.path)
            try:
                self._resume()
            except Failure:
                if not os.fstat(lock.fileno()).st_size:
                    self.job.unlink()
                raise
            digests = {json.dumps(line.id): line.digest for line in self.lines if line.request is not None}
            self._rewrite()
            draft = stack.enter_context(open(_draft(self.job), "w", encoding="utf-8"))
            _lock(draft, self.path)  # before it takes the place of the one that is locked
            draft.write(json.dumps({"settings": self.settings, "requests": digests}))
            draft.flush()
            os.replace(draft.name, self.job)
            self._file = stack.enter_context(open(self.path, "ab"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        with writing(self.path):  # what is in its buffer, and failed before, fails once more
            self._stack.close()

    def _check_place(self) -> None:
        if self.path.exists() and not self.path.is_file():
            raise Failure(Exit.USAGE, f"-o must be a file, got {self.path}, which is a folder or a device; add a name")
        for path in (self.path, self.job, _draft(self.path), _draft(self.job)):
            if path.exists() and os.path.exists(self.requests) and path.samefile(self.requests):
                raise Failure(
                    Exit.USAGE,
                    f"-o {self.path} would write over the requests in {path}; choose another file",
                )

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
        for place, line in enumerate(self.lines):
            if place not in self.outcomes:
                self.add(Outcome(place, line.id, error="was lost with the worker that had it; run the command again"))
        with writing(self.path):
            self._rewrite()
        failed = sum(outcome.error is not None for outcome in self.outcomes.values())
        note(f"{len(self.outcomes) - failed} answers and {failed} errors in {self.path}")
        return Exit.MEDIA if failed else Exit.OK

    def _rewrite(self) -> None:
        _replace(self.path, b"".join(_line(outcome) for _, outcome in sorted(self.outcomes.items())))

    def _resume(self) -> None:
        """Take over the answers of the last run that still hold."""
        answers = self._read()
        settings, digests = self._last()
        if not answers:
            return
        if changed := [key for key in self.settings if self.settings[key] != settings.get(key)]:
            was = ", ".join(f"{key} {settings.get(key)}" for key in changed)
            raise Failure(
                Exit.USAGE,
                f"-o: {self.path} holds answers with other settings ({was}); pass these, delete it, or choose another "
                "file",
            )
        places = {json.dumps(line.id): place for place, line in enumerate(self.lines) if line.request is not None}
        if not places.keys() & answers.keys():
            raise Failure(
                Exit.USAGE,
                f"-o: {self.path} holds answers to other requests, of these it has none; delete it, or choose another "
                "file",
            )
        for key, words in answers.items():
            place = places.get(key)
            if place is not None and digests.get(key) == self.lines[place].digest:
                self.kept.add(place)
                self.outcomes[place] = Outcome(place, self.lines[place].id, words)
        if dropped := len(answers) - len(self.kept):
            note(f"{dropped} answers are dropped, as their requests are others now, or gone")

    def _read(self) -> dict[str, str]:
        """id, as JSON -> answer; of the last run."""
        answers = {}
        if not self.path.exists():
            return answers
        *lines, rest = self.path.read_bytes().split(b"\n")
        for number, text in enumerate([*lines, rest], start=1):
            try:
                answer = json.loads(text)
                if answer.keys() == {"id", "answer"} and isinstance(answer["answer"], str):
                    answers[json.dumps(answer["id"])] = answer["answer"]
                elif answer.keys() != {"id", "error"}:
                    raise ValueError(answer)
            except (ValueError, AttributeError, RecursionError) as error:
                start = b'{"id": '
                if number > len(lines) and text[: len(start)] == start[: len(text)]:
                    break  # cut in its middle, or empty
                raise Failure(
                    Exit.USAGE, f"-o: line {number} of {self.path} is no answer; delete it, or choose another file"
                ) from error
        return answers

    def _last(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Settings, and digests of the requests, of the last run."""
        text = self.job.read_bytes()
        if not text and (not self.path.exists() or not self.path.stat().st_size):
            return {}, {}
        try:
            last = json.loads(text)
            settings, digests = last["settings"], last["requests"]
            if not isinstance(settings, dict) or not isinstance(digests, dict):
                raise TypeError(last)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Failure(
                Exit.USAGE,
                f"-o: {self.path.name} cannot be gone on with, as {self.job} does not tell what it answers; delete "
                "both, or choose another file",
            ) from error
        return settings, digests


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
    except ImportError:  # not Unix
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(file.name).st_ino != os.fstat(file.fileno()).st_ino:  # replaced after it was opened
            raise BlockingIOError
    except BlockingIOError:
        raise Failure(Exit.USAGE, f"-o: another `ppllava run` writes {path}; wait, or choose another file") from None


def _draft(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _replace(path: Path, text: bytes) -> None:
    """Write a file whole or not at all."""
    _draft(path).write_bytes(text)
    os.replace(_draft(path), path)


def _line(outcome: Outcome) -> bytes:
    try:
        text = json.dumps(outcome.as_dict(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair in an id
        text = json.dumps(outcome.as_dict()).encode()
    return text + b"\n"


__all__ = ["AnswerFile", "JobSpec", "local_engine", "read_requests", "run_job"]
