"""Around the commands of `ppllava`: exit codes, errors as one sentence, answers to stdout and all else to stderr."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import IntEnum
from typing import Any

from ppllava_command import ImportFailure, importing

CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and the end of a line; terminals obey them
OFTEN = 300.0  # seconds without a word about the progress of a job


class Exit(IntEnum):
    """The exit codes."""

    OK = 0
    BUG = 1
    USAGE = 2
    MEDIA = 3
    MODEL = 4
    PROMPT = 5
    MEMORY = 6
    OUTPUT = 7
    INTERRUPTED = 130
    PIPE = 141


MEANINGS = {
    Exit.OK: "ok",
    Exit.BUG: "a bug, worth a report",
    Exit.USAGE: "wrong usage",
    Exit.MEDIA: "a file is missing, unreadable, or none of its frames can be decoded, or a drawing cannot be written; "
    "of `run`: some requests have no answer, the file of answers says why",
    Exit.MODEL: "the model cannot be loaded or converted",
    Exit.PROMPT: "the prompt does not fit into the context of the model",
    Exit.MEMORY: "out of memory",
    Exit.OUTPUT: "stdout, or the file of answers, cannot be written",
    Exit.INTERRUPTED: "interrupted with Ctrl-C",
    Exit.PIPE: "nobody reads the answer any more",
}


class Failure(Exception):
    """Ends the command with an exit code and one sentence."""

    def __init__(self, code: Exit, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def sentence(error: BaseException, limit: int = 600) -> str:
    """What an error says, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."


def is_memory(error: BaseException) -> bool:
    """Whether there was too little memory; the CPU's allocator and cuBLAS raise plain RuntimeErrors."""
    torch = sys.modules.get("torch")  # without it none of its errors is there
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, kinds)


def is_fatal(error: BaseException) -> bool:
    """Whether nothing runs on this GPU any more, in this process."""
    return "CUDA error" in str(error) and not is_memory(error)


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command; where it failed, one sentence on stderr, with PPLLAVA_DEBUG=1 after the traceback."""
    if sys.stderr is None:  # closed by the shell; print would take stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    text = ""
    try:
        if sys.stdout is None:
            raise Failure(Exit.OUTPUT, "stdout must be open for the answer, got a closed one; leave out >&-")
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # where the locale is not UTF-8
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else Exit.OK
    except SystemExit:  # so typer and rich end where a pipe is closed
        code = Exit.PIPE
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PPLLAVA_DEBUG") == "1":
            traceback.print_exc()
        code, text = _explain(error)
    if code in (Exit.PIPE, Exit.OUTPUT):
        # What is still buffered goes nowhere, or Python would fail once more at its end.
        with suppress(OSError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code != Exit.PIPE:
        note(text)
    return code


def _explain(error: BaseException) -> tuple[Exit, str]:
    if isinstance(error, Failure):
        return error.code, str(error)
    if isinstance(error, ImportFailure):
        return Exit.USAGE, str(error)
    if is_memory(error):
        remedy = "pass fewer files, --frames or --tokens, --dtype bfloat16, or another --device"
        return Exit.MEMORY, f"out of memory ({sentence(error, 100)}); {remedy}"
    if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "Abort":  # typer's for Ctrl-C
        return Exit.INTERRUPTED, "interrupted"
    if isinstance(error, BrokenPipeError):
        return Exit.PIPE, MEANINGS[Exit.PIPE]
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        # All files are opened by name, so a write without one is to stdout.
        return Exit.OUTPUT, f"stdout cannot be written ({error.strerror}); free some space, or write elsewhere"
    if hasattr(error, "format_message"):  # typer's own
        return Exit.USAGE, f"{error.format_message().rstrip('.')}; --help lists what there is"
    name = f"{type(error).__name__}: {sentence(error)}"
    return Exit.BUG, f"this should not happen, please report it: {name}; PPLLAVA_DEBUG=1 shows where"


def print_json(value: dict[str, Any]) -> None:
    """One line, with escapes where stdout cannot hold a character, and for the control characters that JSON allows."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text), flush=True)


def say(text: str) -> None:
    """A line, or several, on stdout."""
    print(shown(text), flush=True)


def shown(text: str) -> str:
    """A text for stdout: as it is for a file or a pipe, without control characters for a terminal."""
    return visible(text) if sys.stdout.isatty() else text


def visible(text: str) -> str:
    """A text with its control characters as escapes, such as \\x1b, but for tabs and ends of lines."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def note(text: str) -> None:
    with suppress(OSError):  # names of files may hold anything
        print("ppllava:", visible(text).replace("\n", "\\n"), file=sys.stderr, flush=True)


@contextmanager
def timed(clock: dict[str, float], name: str, status: str | None = None) -> Iterator[None]:
    """Adds the seconds to `clock[name]`; says `status` meanwhile, where someone watches."""
    began = time.perf_counter()
    with _status(status) if status else nullcontext():
        yield
    clock[name] = clock.get(name, 0.0) + time.perf_counter() - began


def _status(text: str) -> AbstractContextManager:
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(visible(text)))


@contextmanager
def progress(total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives `advance(count)`, which moves a bar where someone watches, and else notes every tenth, and after five
    minutes. `done` of the total are so before the clock starts."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total, completed=done, rate="")
            pace = _Pace(total, done)
            yield lambda count: bar.update(task, advance=count, rate=pace.advance(count))
        return
    pace = _Pace(total, done)
    told, at = done, pace.began

    def advance(count: int) -> None:
        nonlocal told, at
        rate = pace.advance(count)
        if 10 * told // total < 10 * pace.done // total or pace.now() - at > OFTEN:
            told, at = pace.done, pace.now()
            note(", ".join([f"{told} of {total} requests", *filter(None, (rate, pace.left()))]))

    yield advance


class _Pace:
    """How fast requests are done, and how long the others take at that rate."""

    now = staticmethod(time.monotonic)

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.first, self.began = total, done, done, self.now()

    def advance(self, count: int) -> str:
        """Some more are done; the rate since the start, such as "3.1 a minute"."""
        self.done += count
        if not self.done > self.first:
            return ""
        minute = 60 / self._each()
        if minute < 1:
            return f"{60 * minute:.1f} an hour"
        return f"{minute:,.0f} a minute" if minute >= 100 else f"{minute:.1f} a minute"

    def left(self) -> str:
        """Such as "39 min left"; empty where nothing is."""
        seconds = self._each() * (self.total - self.done) if self.done > self.first else 0
        if not self.done < self.total or not seconds:
            return ""
        if seconds < 100:
            return f"{seconds:.0f} s left"
        return f"{seconds / 60:.0f} min left" if seconds < 6000 else f"{seconds / 3600:.1f} h left"

    def _each(self) -> float:
        return max(self.now() - self.began, 1e-3) / (self.done - self.first)


@contextmanager
def quiet(status: str | None = None) -> Iterator[None]:
    """Of all warnings only those about the user's files and question, as notes."""
    if os.environ.get("PPLLAVA_DEBUG") == "1":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with importing():
            from transformers import logging

            from .batching import BatchWarning
            from .video import VideoWarning
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        try:
            with _status(status) if status else nullcontext():
                warnings.filterwarnings("always", category=VideoWarning)
                warnings.filterwarnings("always", category=BatchWarning)
                warnings.filterwarnings("default", message="guide_text of")  # one note for all files
                warnings.showwarning = lambda message, *_, **__: note(str(message))
                yield
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


__all__ = [
    "MEANINGS",
    "Exit",
    "Failure",
    "is_fatal",
    "is_memory",
    "note",
    "print_json",
    "progress",
    "quiet",
    "run",
    "say",
    "sentence",
    "shown",
    "timed",
    "visible",
]
