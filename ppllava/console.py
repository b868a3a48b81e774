"""Around the commands of `ppllava`: exit codes, errors as one sentence, answers to stdout and all else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from enum import IntEnum
from typing import Any

import torch
from transformers import logging as transformers_logging


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
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    named = isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    return named or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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
    """One line, with escapes where stdout cannot hold a character."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text, flush=True)


def note(text: str) -> None:
    with suppress(OSError):
        print("ppllava:", text.replace("\n", "\\n"), file=sys.stderr, flush=True)  # names of files may hold some


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

    return Console(stderr=True).status(text)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Gives `advance(count)`, which moves a bar where someone watches, and else notes every tenth."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total)
            yield lambda count: bar.advance(task, count)
        return
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        before, done = done, done + count
        if 10 * before // total < 10 * done // total:
            note(f"{done} of {total} requests are done")

    yield advance


@contextmanager
def quiet(status: str | None = None) -> Iterator[None]:
    """Of all warnings only those about the user's files and question, as notes."""
    from .batching import BatchWarning
    from .video import VideoWarning

    if os.environ.get("PPLLAVA_DEBUG") == "1":
        yield
        return
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), _status(status) if status else nullcontext():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=VideoWarning)
            warnings.filterwarnings("always", category=BatchWarning)
            warnings.filterwarnings("default", message="guide_text of")  # one note for all files
            warnings.showwarning = lambda message, *_, **__: note(str(message))
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


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
    "sentence",
    "timed",
]
