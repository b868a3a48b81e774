"""From images and frames in any form to pixel values of the vision tower."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .compat import load_image
from .rows import decode, file_of, frames_of, is_decoder, is_row
from .sampling import sample_uniform

# What Pillow decodes by itself.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "PCX", "SGI")
_EXPECTED = {
    "image": "an image must be a path, a PIL image, uint8 [H, W, 3] or a tensor [3, H, W], got {}; pass frames as "
    "videos",
    "video": "a video must be a path, frames [T, H, W, 3], a tensor [T, 3, H, W] or a list of images, got {}; add the "
    "axis of the frames to a single image",
}
_URLS = ("http:", "https:", "data:")


def flatten(kind: str, media: Any) -> list[Any]:
    """The single images or videos in nested lists of them."""
    return list(_flatten(kind, media))


def is_one(kind: str, medium: Any) -> bool:
    """Whether it is a single image or video."""
    medium = frames_of(medium)
    if isinstance(medium, (str, os.PathLike)) or (kind == "video" and is_row(medium)):
        return True
    if kind == "image":
        return hasattr(medium, "convert") or getattr(medium, "ndim", 0) == 3
    if isinstance(medium, (list, tuple)) and not hasattr(medium, "frames"):
        first = frames_of(medium[0]) if len(medium) else None
        return hasattr(first, "convert") or getattr(first, "ndim", 0) == 3
    return hasattr(medium, "frames") or hasattr(medium, "features") or getattr(medium, "ndim", 0) == 4


def read_frames(video: Any, num_frames: int | None, fps: float | None, default: int) -> Tensor:
    """A video in any form as uint8 [T, 3, H, W]; `default` frames of a file where neither count nor rate is given."""
    video = frames_of(video)
    count = default if num_frames is None and fps is None else num_frames
    with file_of(video) as path:
        if path is not None:
            from .video import read_video  # needs PyAV, which decoded frames do not

            frames = torch.from_numpy(read_video(path, num_frames=count, fps=fps).frames)  # [T, H, W, 3]
    if path is None and is_decoder(video):
        frames = _as_tensor(decode(video, count, fps))
    elif path is None:
        if fps is not None:
            raise ValueError(f"fps={fps} needs the times of a file, got decoded frames; pass a path, or num_frames")
        frames = _as_tensor(getattr(video, "frames", video))
        if num_frames is not None:
            if isinstance(num_frames, bool) or not isinstance(num_frames, Integral):
                raise TypeError(f"num_frames must be an int, got {num_frames!r}; pass for example 32")
            frames = frames[sample_uniform(num_frames, len(frames))]
    return frames.permute(0, 3, 1, 2) if frames.shape[-1] == 3 else frames


def read_image(image: Any) -> Image.Image:
    """An image in any form as a PIL image in RGB, turned upright."""
    image = frames_of(image)
    if isinstance(image, Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        rgb = image.transpose(1, 2, 0) if image.ndim == 3 and image.shape[0] == 3 != image.shape[-1] else image
        if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[-1] != 3 or not rgb.size:
            raise ValueError(
                f"an image must be uint8 [H, W, 3] or [3, H, W] in 0 ... 255, got {image.dtype} of shape "
                f"{list(image.shape)}; convert it to uint8 RGB"
            )
        return Image.fromarray(np.ascontiguousarray(rgb))
    if isinstance(image, Image.Image):
        return _rgb(image)
    name = os.fspath(image)
    # A base64 string is long and no path; everything else was meant as one.
    if len(name) < 512 and not os.path.exists(name) and not name.startswith(_URLS):
        raise FileNotFoundError(f"{name}: there is no such image; check the path")
    if os.path.exists(name):
        return _rgb(open_image(name))
    try:
        return load_image(name)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(name if len(name) < 512 else "image", error) from None


def open_image(path: str | os.PathLike) -> Image.Image:
    """An image file, decoded when it is used.

    Raises:
        ValueError: for what Pillow cannot open, for formats that run other programs (PostScript), and for images that
            would take more memory than Pillow's limit.
    """
    Image.init()  # some plugins are there only where their library is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable(os.fspath(path), error) from None


def resize(frames: Tensor, edge: int, resize_mode: str) -> Tensor:
    """frames uint8 [T, 3, H, W] -> uint8 [T, 3, edge, edge]; bicubic with antialiasing."""
    height, width = frames.shape[2:]
    size = (edge, edge)
    if resize_mode == "crop":
        shorter = min(height, width)
        size = (height * edge // shorter, width * edge // shorter)
    # uint8 in, uint8 out, as Pillow resizes: the same within two levels on natural frames, five times as fast.
    frames = torch.nn.functional.interpolate(frames, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - edge) // 2, (size[1] - edge) // 2
    return frames[:, :, top : top + edge, left : left + edge]


def normalize(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """frames uint8 [T, 3, S, S] -> pixel values float32 [T, 3, S, S], on the device of the frames."""
    center = 255 * torch.tensor(list(mean), device=frames.device).view(3, 1, 1)
    scale = 255 * torch.tensor(list(std), device=frames.device).view(3, 1, 1)
    return frames.to(torch.float32, memory_format=torch.contiguous_format).sub_(center).div_(scale)


def _rgb(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(getattr(image, "filename", "") or type(image).__name__, error) from None


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = str(error).split("\n")[0][:200]
    return ValueError(f"{name}: cannot be read as an image ({reason}); pass a file that Pillow opens")


def as_frames(image: Image.Image) -> Tensor:
    """One image as uint8 [1, 3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _flatten(kind: str, media: Any) -> Iterator[Any]:
    if is_one(kind, media):
        yield media
    elif isinstance(media, (list, tuple)) or getattr(media, "ndim", 0) > 3 + (kind == "video"):
        for medium in media:
            yield from _flatten(kind, medium)
    else:
        got = f"shape {list(media.shape)}" if hasattr(media, "shape") else type(media).__name__
        raise ValueError(_EXPECTED[kind].format(got))


def _as_tensor(frames: Any) -> Tensor:
    """Decoded frames as uint8 [T, H, W, 3] or [T, 3, H, W]."""
    if isinstance(frames, (list, tuple)):
        frames = [frames_of(frame) for frame in frames]
        images = [np.asarray(_rgb(frame) if hasattr(frame, "convert") else frame) for frame in frames]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ValueError(f"the frames of a video must have one size, got {sorted(shapes)}; resize them to one")
        frames = np.stack(images)
    if isinstance(frames, np.ndarray):
        # torch takes no read-only or flipped views.
        frames = torch.from_numpy(np.require(frames, requirements=("C", "W")))
    if not isinstance(frames, Tensor):
        raise TypeError(
            "a video must be a path, frames [T, H, W, 3], a tensor [T, 3, H, W] or a list of images, got "
            f"{type(frames).__name__}; pass one of these"
        )
    if frames.dtype != torch.uint8 or 3 not in (frames.shape[-1], frames.shape[1]) or not len(frames):
        raise ValueError(
            f"the frames of a video must be uint8 [T, H, W, 3] or [T, 3, H, W] in 0 ... 255, got {frames.dtype} of "
            f"shape {list(frames.shape)}; convert them to uint8 RGB"
        )
    return frames


__all__ = [
    "as_frames",
    "flatten",
    "is_one",
    "normalize",
    "open_image",
    "read_frames",
    "read_image",
    "resize",
]
