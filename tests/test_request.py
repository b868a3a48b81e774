"""Requests of a batch, from Python: what may be decoded already, and when two share a source."""

from pathlib import Path

import numpy as np
import pytest

from ppllava.request import Request, RequestError

FRAMES = np.zeros((2, 8, 8, 3), dtype=np.uint8)


def of(**given):
    return Request.of({"id": 1, "prompt": "?", **given})


@pytest.mark.parametrize(
    ("given", "kind", "count"),
    [
        ({"video": "a.mp4"}, "video", 1),
        ({"video": Path("a.mp4")}, "video", 1),
        ({"video": FRAMES, "frames": 2}, "video", 1),
        ({"video": [FRAMES[0], FRAMES[1]]}, "video", 1),
        ({"image": FRAMES[0]}, "image", 1),
        ({"images": ["i.png", FRAMES[0]]}, "image", 2),
        ({"images": ("i.png",)}, "image", 1),
        ({"video": "a.mp4", "image": None, "frames": None}, "video", 1),
    ],
)
def test_media(given, kind, count):
    source = of(**given).source
    assert (source.kind, len(source.items)) == (kind, count)


def test_sampling():
    request = of(video="a.mp4", fps=0.5, start=0, end=2.5, max_new_tokens=7)
    assert request.source.sampling == (None, 0.5, 0, 2.5)
    assert request.max_new_tokens == 7


def test_equal_sources_share_a_key():
    key = of(video="a.mp4", frames=4).source.key()
    assert of(video=Path("a.mp4"), frames=4, prompt="Other?").source.key() == key
    others = [{"video": "a.mp4"}, {"video": "a.mp4", "frames": 5}, {"video": "b.mp4", "frames": 4}, {"image": "a.mp4"}]
    assert key not in [of(**other).source.key() for other in others]
    assert of(video=FRAMES).source.key() == of(video=FRAMES).source.key() != of(video=FRAMES.copy()).source.key()
    assert of(video="./b/../a.mp4").source.key(4) == key  # the same file, and frames by default


@pytest.mark.parametrize("given", [None, 1, "a", ["id"], {}, {"id": 1}, {"id": 1, "prompt": "?"}, {1: 2}], ids=str)
def test_what_is_no_request(given):
    with pytest.raises(RequestError):
        Request.of(given)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("nan"), float("inf"), 1e300, "1", True, -0.5])
@pytest.mark.parametrize("key", ["fps", "start", "end"])
def test_numbers_that_are_none(key, value):
    with pytest.raises(RequestError, match=f"{key} must be a number of .* less than 1e\\+09, got "):
        of(video="a.mp4", **{key: value})


def test_errors_are_short():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("a" * 10_000, ["a"] * 10_000, object(), deep):
        with pytest.raises(RequestError) as raised:
            of(video="a.mp4", max_new_tokens=value)
        assert len(str(raised.value)) < 200
    while deep:  # or its end would be a recursion, too
        deep = deep.pop()
