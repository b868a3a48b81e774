"""Options of the command line, checked before PyTorch is imported: a wrong one costs no waiting."""

from __future__ import annotations

import os
from enum import Enum
from typing import TYPE_CHECKING

from .console import Exit, Failure
from .preset_sizes import NAMES

if TYPE_CHECKING:
    import torch


class Dtype(str, Enum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def torch(self) -> torch.dtype | None:
        """The dtype of PyTorch; None is that of the files."""
        import torch

        return None if self is Dtype.AUTO else getattr(torch, self.value)


class Engine(str, Enum):
    LOCAL = "local"
    RAY = "ray"


def check_question(paths: list[str], question: str) -> None:
    """Raise a Failure where the last argument of `ask` is no question, or no file comes before it."""
    if not paths or os.path.isfile(question):
        raise Failure(
            Exit.USAGE,
            f"ask needs one or more files and then the question, got {question!r} as the last argument; write for "
            "example: ppllava ask clip.mp4 'What happens?'",
        )
    try:
        question.encode()
    except UnicodeEncodeError:
        raise Failure(
            Exit.USAGE, f"QUESTION must be valid text, got {question!r}; write it in UTF-8, in a UTF-8 locale"
        ) from None
    if not question.strip():
        raise Failure(Exit.USAGE, "QUESTION must ask something, got an empty text; it guides the compression, too")


def check_options(
    model: str | None,
    preset: str | None,
    frames: int | None,
    fps: float | None,
    start: float | None = None,
    end: float | None = None,
    temperature: float = 0.0,
) -> None:
    """Raise a Failure for options of `ask` and `run` that have no meaning, or none together."""
    if (model is None) == (preset is None):
        got = "neither" if model is None else "both"
        raise Failure(
            Exit.USAGE, f"exactly one of --model and --preset must be given, got {got}; --model takes a folder"
        )
    if preset is not None and preset not in NAMES:
        raise Failure(Exit.USAGE, f"--preset must be one of {', '.join(NAMES)}, got {preset!r}")
    if frames is not None and fps is not None:
        raise Failure(Exit.USAGE, f"--frames and --fps exclude each other, got {frames} and {fps:g}; leave one out")
    if fps is not None and not 0 < fps < float("inf"):
        raise Failure(Exit.USAGE, f"--fps must be a positive number of frames a second, got {fps:g}; try 1")
    if start is not None and end is not None and end < start:
        raise Failure(Exit.USAGE, f"--end must not be before --start, got {end:g} and {start:g}; swap them")
    if temperature and not 1e-3 <= temperature <= 1e3:
        raise Failure(
            Exit.USAGE,
            f"--temperature must be 0, or in 0.001 ... 1000, got {temperature:g}; 0 takes the likeliest token",
        )


def check_job(memory: float | None, workers: int | None, engine: Engine) -> None:
    """Raise a Failure for options of `run` alone."""
    if memory is not None and not 2**-20 <= memory < 2**20:
        raise Failure(Exit.USAGE, f"--memory must be GiB, more than 0, got {memory:g}; try 8")
    if workers is not None and engine is Engine.LOCAL:
        raise Failure(Exit.USAGE, "--workers is for --engine ray, got --engine local; leave it out, or see --threads")


def random_weights(preset: str) -> str:
    """What is to be said beside the answers of a preset."""
    return f"the preset {preset} has random weights: what it answers means nothing; --model takes a trained one"


__all__ = ["Dtype", "Engine", "check_job", "check_options", "check_question", "random_weights"]
