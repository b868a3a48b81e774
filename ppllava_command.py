"""The program `ppllava`. Outside of the package, whose import takes seconds in which Ctrl-C must not be a traceback."""

import logging
import os
import signal
import sys

# transformers imports torchao where it is installed, which warns of each of its GPU libraries that a CPU lacks.
for name in ("torchao", "torch.utils._pytree") if os.environ.get("PPLLAVA_DEBUG") != "1" else ():
    logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _leave)
    try:
        from ppllava.cli import main as command
    except ModuleNotFoundError as error:
        if os.environ.get("PPLLAVA_DEBUG") == "1":
            raise
        sys.exit(_missing(error.name))
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    command()


def _leave(*_) -> None:
    # An exception could be caught by any of the modules being imported.
    try:
        os.write(2, b"ppllava: interrupted\n")
    finally:
        os._exit(130)


def _missing(name: str) -> int:
    print(
        f"ppllava: the command line needs {name}, which is missing; pip install 'ppllava-kernels[cli]'", file=sys.stderr
    )
    return 2


if __name__ == "__main__":
    main()
