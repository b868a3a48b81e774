"""The file of answers of `ppllava run`, which an interrupted job goes on with."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .console import Exit, Failure, note
from .packing import Outcome
from .request import Request


@dataclass
class Line:
    """One line of the file of requests: what it asks, or what is wrong with it."""

    number: int
    is_object: bool = False
    id: str | int | None = None
    request: Request | None = None
    digest: str = ""
    error: str = ""


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
        with writing(self.path), self._stack as stack:  # a file that cannot be written fails again where it is closed
            self._check_place()
            lock = stack.enter_context(open(self.job, "a", encoding="utf-8"))
            _lock(lock, self.path)
            try:
                self._resume()
            except Failure:
                if not os.fstat(lock.fileno()).st_size:
                    self.job.unlink()
                raise
            self._rewrite()
            self._describe(stack)
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
        with writing(self.path):
            self._find()
            self.outcomes[outcome.index] = outcome
            self._file.write(_line(outcome))
            self._file.flush()

    def finish(self) -> int:
        """All in the order of the requests; the exit code."""
        for place, line in enumerate(self.lines):
            if place not in self.outcomes:
                self.add(Outcome(place, line.id, error="was lost with the worker that had it; run the command again"))
        with writing(self.path):
            self._find()
            self._rewrite()
        failed = sum(outcome.error is not None for outcome in self.outcomes.values())
        note(f"{_count(len(self.outcomes) - failed, 'answer')} and {_count(failed, 'error')} in {self.path}")
        return Exit.MEDIA if failed else Exit.OK

    def _find(self) -> None:
        """See whether the file still has its name: what is written to a file without one is lost.

        A file that was removed is written anew with all that is known. Nothing is written to another file of its name.
        """
        try:
            same = os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise Failure(
                    Exit.OUTPUT,
                    f"{self.path} is gone with its folder, and with it {_count(len(self.outcomes), 'outcome')}; make "
                    "the folder again, and run the command again",
                ) from None
            self._rewrite()
            if not self.job.exists():
                self._describe(self._stack)
            self._file = self._stack.enter_context(open(self.path, "ab"))  # noqa: SIM115
            return
        if not same:
            raise Failure(
                Exit.OUTPUT,
                f"{self.path} is another file than the one with the answers so far, something has replaced it; move it "
                "away, and run the command again",
            )

    def _describe(self, stack: ExitStack) -> None:
        """Write what the answers depend on; the lock on it ends with `stack`."""
        digests = {json.dumps(line.id): line.digest for line in self.lines if line.request is not None}
        draft = stack.enter_context(open(_draft(self.job), "w", encoding="utf-8"))  # noqa: SIM115
        _lock(draft, self.path)  # before it takes the place of the one that is locked
        draft.write(json.dumps({"settings": self.settings, "requests": digests}))
        _put(draft, self.job)

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
    """Write a file whole or not at all, whatever happens to the machine."""
    with open(_draft(path), "wb") as draft:
        draft.write(text)
        _put(draft, path)


def _put(draft: IO[Any], path: Path) -> None:
    """A file that was written takes the place of another, once the disk has it: its name must not outlive its text."""
    draft.flush()
    os.fsync(draft.fileno())
    os.replace(draft.name, path)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _line(outcome: Outcome) -> bytes:
    try:
        text = json.dumps(outcome.as_dict(), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair in an id
        text = json.dumps(outcome.as_dict()).encode()
    return text + b"\n"


def _count(number: int, what: str) -> str:
    """ "1 error", "2 errors"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


__all__ = ["AnswerFile", "Line"]
