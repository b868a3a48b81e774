#!/usr/bin/env bash
# torchcodec 0.13.0, seek_mode="exact" (the default): of an AVI with B-frames `decoder[i]` returns other frames than those
# in order of display, without an error or a warning. PyAV, which reads the same file with the same FFmpeg, gives them in
# order. MSVD, a common benchmark of video LLMs, is such a set of AVI files.
#
# torchcodec loads the FFmpeg 8 that PyAV's wheel brings, so both read with one FFmpeg. Fails where that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchcodec==0.13.0 av==18.1.0 numpy
cat > "$folder/run.py" <<'PYTHON'
from importlib.metadata import version

import av
import numpy as np
from torchcodec.decoders import VideoDecoder

FRAMES = 24


def encode(path):
    """Frame i is of the grey 8 * i + 20."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "2", "qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(FRAMES):
            picture = np.full((48, 64, 3), 8 * i + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def number(grey):
    return round((float(grey) - 20) / 8)


for name in ("clip.mp4", "clip.avi"):
    encode(name)
    with av.open(name) as container:
        in_order = [number(frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    assert in_order == [*range(FRAMES)], in_order
    decoder = VideoDecoder(name, seek_mode="exact")
    got = []
    for i in range(len(decoder)):
        try:
            got.append(number(decoder[i].float().mean()))
        except Exception as error:
            got.append(type(error).__name__)
    print("torchcodec", version("torchcodec"), name, "frames 0, 1, 2 ... are", got)
    if name == "clip.mp4":
        assert got == in_order, "wrong in mp4, too"
    else:
        assert [x for x in got if isinstance(x, int)] != in_order, "right in AVI now"
PYTHON
mkdir "$folder/ffmpeg"
for file in "$folder"/venv/lib/python3*/site-packages/av.libs/*.so*; do
    # libavcodec-0123abcd.so.62.1.2, under the name that torchcodec asks for: libavcodec.so.62
    name=$(basename "$file" | sed -E 's/-[0-9a-f]+\.so\.([0-9]+).*/.so.\1/')
    ln -sf "$file" "$folder/ffmpeg/$name"
done
cd "$folder"
LD_LIBRARY_PATH="$folder/ffmpeg" "$folder/venv/bin/python" "$folder/run.py"
