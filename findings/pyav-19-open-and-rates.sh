#!/usr/bin/env bash
# PyAV 19.0.2 (what Python 3.12 and newer get): `av.open` no longer takes `metadata_errors=`, so that a call with it, which
# PyAV 18 needs for tags that are not UTF-8, is a TypeError for every file. And rates and time bases are no
# `fractions.Fraction` any more: `isinstance(rate, numbers.Rational)` is True, but `int(rate)`, `round(rate)` and
# `rate.limit_denominator()` raise. `float(rate)` works in both.
#
# Needs python3.12 or newer as PYTHON. Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.12}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==19.0.2 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import fractions
import numbers

import av
import numpy as np

with av.open("clip.mp4", "w") as container:
    stream = container.add_stream("mpeg4", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    for _ in range(5):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
    container.mux(stream.encode())
print("PyAV", av.__version__)
try:
    av.open("clip.mp4", metadata_errors="replace")
except TypeError as error:
    print("TypeError:", error)
else:
    raise SystemExit("av.open takes metadata_errors again")
with av.open("clip.mp4") as container:
    rate = container.streams.video[0].average_rate
print(type(rate), float(rate))
assert float(rate) == 25
assert isinstance(rate, numbers.Rational)
assert not isinstance(rate, fractions.Fraction), "a Fraction again"
for call in (int, round, lambda rate: rate.limit_denominator(10)):
    try:
        call(rate)
    except (TypeError, AttributeError) as error:
        print(f"{type(error).__name__}: {error}")
    else:
        raise SystemExit("rates are like a Fraction again")
PYTHON
