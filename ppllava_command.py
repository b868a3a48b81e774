"""The program `ppllava`. Outside of the package, so that it watches over the import of the package, too."""

import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

REMEDY = 'run pip install --no-build-isolation ".[cli]" in the folder of the sources'


class ImportFailure(Exception):
    """A module of the command line cannot be imported; the message is one sentence for the user."""


def main() -> None:
    try:
        with importing(), warning():
            from ppllava.cli import main as command
    except ImportFailure as error:
        if os.environ.get("PPLLAVA_DEBUG") == "1":
            raise
        print(f"ppllava: {error}", file=sys.stderr)
        sys.exit(2)
    command()


@contextmanager
def importing() -> Iterator[None]:
    """Where modules are imported: Ctrl-C ends the process with code 130 and no traceback.

    Raises:
        ImportFailure: where one of them is missing, or cannot be imported.
    """
    handler = signal.getsignal(signal.SIGINT)
    watched = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if watched:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _leave)
    try:
        yield
    # What half an installation raises, and what PyTorch asserts after an import of it that failed before.
    except (ImportError, OSError, RuntimeError, AttributeError, AssertionError) as error:
        raise ImportFailure(why_not(error)) from error
    finally:
        if watched:
            signal.signal(signal.SIGINT, handler)


@contextmanager
def warning() -> Iterator[None]:
    """What the package warns of while it is imported, as a library that nobody has tried, is one line."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(
            f"ppllava: {str(message).removeprefix('ppllava ')}", file=sys.stderr
        )
        yield


def why_not(error: BaseException) -> str:
    """The sentence about an error of an import. Transformers hides the cause, and raises an error without a name."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        return "no temporary folder can be written; free some space, or set TMPDIR to a folder that has some"
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if "torchvision" in str(cause) and not _is_missing(cause):
            torch, torchvision = version("torch"), version("torchvision")
            return (
                f"torchvision {torchvision} does not fit torch {torch} ({_line(cause)}); install the torchvision that "
                "was built for this torch, or uninstall it, as ppllava needs none"
            )
    for cause in reversed(causes):
        if _is_missing(cause):
            return f"the command line needs {cause.name}, which is missing; {REMEDY}"
    text = f"{type(causes[-1]).__name__}: {_line(causes[-1])}"
    return f"the command line cannot be imported ({text}); {REMEDY}, PPLLAVA_DEBUG=1 shows where it fails"


def version(package: str) -> str:
    """The version of an installed package, or "none"; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _is_missing(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name is not None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _leave(*_) -> None:
    # An exception could be caught by any of the modules being imported.
    try:
        os.write(2, b"ppllava: interrupted\n")
    finally:
        os._exit(130)


if __name__ == "__main__":
    main()
