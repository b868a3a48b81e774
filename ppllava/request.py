"""One request of a batch job, checked: an id, a question, and the files that it is about."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS = ("id", "prompt", "video", "image", "images", "frames", "fps", "start", "end", "max_new_tokens")
MEDIA = ("video", "image", "images")
SAMPLING = ("frames", "fps", "start", "end")
URLS = ("http:", "https:", "ftp:", "data:")
COUNT = 1 << 20  # the most of anything that is counted, or numbers of 30 digits would reach the model
MAX_NEW_TOKENS = 256  # of the answer to a request that names no number
MOST = 1e9  # seconds, or frames a second


class RequestError(ValueError):
    """The request cannot be answered whatever is in its files; the message says what to change."""


@dataclass(frozen=True)
class Source:
    """What several requests may share: a video and which frames of it, or images.

    items     one video, or the images: paths, or anything decoded that :class:`PPLlavaProcessor` takes
    sampling  (frames, fps, start, end), None where not given
    """

    kind: str
    items: tuple[Any, ...]
    sampling: tuple[int | float | None, ...] = (None,) * len(SAMPLING)

    def key(self, frames: int | None = None) -> tuple:
        """Equal for requests that share it: the same files, or the same objects; `frames` where none are named."""
        names = tuple(_real(x) if isinstance(x, (str, os.PathLike)) else id(x) for x in self.items)
        count, fps, *span = self.sampling
        file = self.kind == "video" and isinstance(names[0], str)
        return self.kind, names, frames if file and count is None and fps is None else count, fps, *span


@dataclass(frozen=True)
class Request:
    """A question about one source; `id` comes back with its answer."""

    id: str | int
    prompt: str
    source: Source
    max_new_tokens: int | None = None

    @classmethod
    def of(cls, given: Any) -> Request:
        """From a mapping: `id`, `prompt`, one of `video`, `image` and `images`, and for a video optionally `frames` or
        `fps`, `start` and `end` in seconds; `max_new_tokens`.

        Raises:
            RequestError: for anything else.
        """
        if not isinstance(given, Mapping):
            raise RequestError(f"a request must be an object with id, prompt and video, got {shown(given)}")
        if unknown := [str(key) for key in given if key not in KEYS]:
            raise RequestError(f"unknown keys {', '.join(unknown)}; a request has {', '.join(KEYS)}")
        name = given.get("id")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise RequestError(f"id must be text or a whole number, got {shown(name)}; every answer carries it")
        prompt = given.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError(f"prompt must be text, got {shown(prompt)}; write the question in quotes")
        if not prompt.strip():
            raise RequestError(f"prompt must ask something, got {shown(prompt)}; it guides the compression, too")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"prompt must be valid text, got {shown(prompt)}; half a surrogate pair is none"
            ) from None
        for token in ("<image>", "<video>"):
            if token in prompt:
                raise RequestError(f"prompt must not hold {token}, which stands for a file; leave it out")
        return cls(name, prompt, _source(given), _count("max_new_tokens", given.get("max_new_tokens")))


def _real(path: str | os.PathLike) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # no file can have such a name
        return os.fspath(path)


def _source(given: Mapping) -> Source:
    media = [key for key in MEDIA if given.get(key) is not None]
    if len(media) != 1:
        got = " and ".join(media) or "none"
        raise RequestError(f"exactly one of video, image and images must be given, got {got}; ask about one of them")
    [kind] = media
    items = given[kind]
    if kind == "images":
        if not isinstance(items, (list, tuple)) or not items:
            raise RequestError(f"images must be a list of at least one image, got {shown(items)}")
    else:
        items = [items]
    for item in items:
        url = isinstance(item, str) and item.lower().startswith(URLS)
        lost = not item if isinstance(item, str) else item is None or isinstance(item, (bool, int, float, Mapping))
        if lost or (isinstance(item, (list, tuple)) and any(isinstance(x, (str, os.PathLike)) for x in item)):
            raise RequestError(f"{kind} must be the path of a file, got {shown(item)}")
        if url:
            raise RequestError(f"{kind} must be the path of a file, got {shown(item)}; download it first")
    sampling = {key: given.get(key) for key in SAMPLING}
    if kind != "video":
        if extra := [key for key, value in sampling.items() if value is not None]:
            raise RequestError(f"{extra[0]} is for videos, got {kind}; leave it out")
        return Source("image", tuple(items))
    _count("frames", sampling["frames"])
    for key in ("fps", "start", "end"):
        _seconds(key, sampling[key])
    if sampling["frames"] is not None and sampling["fps"] is not None:
        raise RequestError("frames and fps exclude each other, got both; leave one out")
    if sampling["start"] is not None and sampling["end"] is not None and sampling["end"] < sampling["start"]:
        raise RequestError(f"end must not be before start, got {sampling['end']:g} and {sampling['start']:g}")
    return Source(kind, tuple(items), tuple(sampling.values()))


def _count(key: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= COUNT:
        raise RequestError(f"{key} must be a whole number in 1 ... {COUNT}, got {shown(value)}")
    return value


def _seconds(key: str, value: Any) -> None:
    if value is None:
        return
    least = "more than 0" if key == "fps" else "at least 0"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < MOST or (key == "fps" and not value):
        raise RequestError(f"{key} must be a number of {least} and less than {MOST:g}, got {shown(value)}")


def shown(value: Any) -> str:
    """As it stands in JSON, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return "none" if value is None else text if len(text) <= 60 else f"{text[:60]} ..."


__all__ = ["COUNT", "KEYS", "MAX_NEW_TOKENS", "Request", "RequestError", "Source", "shown"]
