"""From the images and videos of a batch to clips: frames that share one softmax, packed one after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pooling import VisualPooling, Window

AXES = {"pixel_values_videos": "3, S, S", "video_features": "H, W, V"}


class Clip(NamedTuple):
    """Consecutive frames that share one softmax: a video, an image with its views, or a list of images.

    frames  how many
    window  of the pooling
    sizes   (height, width) of the images before preprocessing; none for a video
    """

    frames: int
    window: Window
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def in_list(self) -> bool:
        return len(self.sizes) > 1

    @property
    def tower_frames(self) -> list[int]:
        """Frames of each clip that a vision tower with an adapter sees: the views of an image are one frame each."""
        return [1] * self.frames if len(self.sizes) == 1 else [self.frames]


def pack_videos(
    name: str, videos: Tensor, video_frames: Tensor | None, pooling: VisualPooling
) -> tuple[Tensor, list[Clip]]:
    """(all frames [F, ...], clips) for pixels or features, packed as [F, ...] as well as dense as [B, T, ...]."""
    _check_floating(name, videos)
    shape, one = list(videos.shape), AXES[name]
    if name == "pixel_values_videos":
        _check_size(name, shape, pooling)
    if video_frames is None:
        if len(shape) != 5:
            raise ValueError(
                f"{name} must be [B, T, {one}] where video_frames is None, got shape {shape}; pass the number of "
                f"frames of each video to pack videos as [F, {one}]"
            )
        return videos.flatten(0, 1), [Clip(shape[1], pooling.video_window(shape[1]))] * shape[0]
    frames = _numbers("video_frames", video_frames, "[B]")
    if len(shape) != 4 or sum(frames) != shape[0] or min(frames, default=0) < 1:
        raise ValueError(
            f"{name} must be [F, {one}] with F = {sum(frames)}, the sum of video_frames, each at least 1, got shape "
            f"{shape} and video_frames {frames}; concatenate the frames of all videos"
        )
    return videos, [Clip(n, pooling.video_window(n)) for n in frames]


def check_features(video_features: Tensor, shape: tuple[int, ...]) -> None:
    """A ValueError unless they can be of this vision tower."""
    if tuple(video_features.shape[-3:]) != shape:
        raise ValueError(
            f"video_features must be [F, {', '.join(map(str, shape))}] of this model's vision tower, got shape "
            f"{list(video_features.shape)}; encode the video with this model"
        )


def pack_images(
    pixel_values: Tensor,
    image_sizes: Tensor | None,
    image_views: Tensor | None,
    image_groups: Tensor | None,
    pooling: VisualPooling,
) -> tuple[Tensor, list[Clip]]:
    """(pixel_values [V, 3, S, S], one clip for each group) for packed views."""
    _check_floating("pixel_values", pixel_values)
    views = [1] * len(pixel_values) if image_views is None else _numbers("image_views", image_views, "[I]")
    groups = [1] * len(views) if image_groups is None else _numbers("image_groups", image_groups, "[G]")
    # Only the grid of an image in several views depends on its size.
    square = (pooling.view_size,) * 2
    sizes = [square] * len(views) if image_sizes is None else _numbers("image_sizes", image_sizes, "[I, 2]")
    shape = list(pixel_values.shape)
    _check_size("pixel_values", shape, pooling)
    if len(shape) != 4 or sum(views) != shape[0] or min(views, default=0) < 1:
        raise ValueError(
            f"pixel_values must be [V, 3, S, S] with V = {sum(views)}, the sum of image_views, each at least 1, got "
            f"shape {shape} and image_views {views}; concatenate the views of all images"
        )
    if sum(groups) != len(views) or min(groups, default=0) < 1 or len(sizes) != len(views):
        raise ValueError(
            f"image_groups must sum to the {len(views)} images of image_views, and image_sizes have one row for each, "
            f"got image_groups {groups} and {len(sizes)} rows; pass them as PPLlavaProcessor makes them"
        )
    clips, start = [], 0
    for count in groups:
        end = start + count
        _check_views(views[start:end], sizes[start:end], pooling)
        images = tuple(tuple(size) for size in sizes[start:end])
        clips.append(Clip(sum(views[start:end]), pooling.image_window(), images))
        start = end
    return pixel_values, clips


def _check_views(views: list[int], sizes: list, pooling: VisualPooling) -> None:
    if len(views) > 1 and max(views) > 1:
        raise ValueError(
            f"image_views must be 1 for each image of a list, got {views}; give each image a group of its own for views"
        )
    if len(views) == 1 and views[0] > 1:
        rows, columns = pooling.view_grid(sizes[0]) if pooling.image_grid_pinpoints else (0, 0)
        if views[0] != 1 + rows * columns:
            raise ValueError(
                f"image_views must be 1, or 1 + {rows} * {columns} for an image of {sizes[0][0]} x {sizes[0][1]} "
                f"pixels, got {views[0]}; let PPLlavaProcessor cut it, with the image_grid_pinpoints of the model"
            )


def _check_floating(name: str, pixels: Tensor) -> None:
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        got = pixels.dtype if isinstance(pixels, Tensor) else type(pixels).__name__
        raise TypeError(
            f"{name} must be floating point, normalised as the vision tower wants it, got {got}; let "
            "PPLlavaProcessor make it"
        )


def _check_size(name: str, shape: list[int], pooling: VisualPooling) -> None:
    if len(shape) < 4 or shape[-3:-1] != [3, pooling.view_size]:
        raise ValueError(
            f"{name} must end with [3, S, S], S = {pooling.view_size} pixels of this model's vision tower, got shape "
            f"{shape}; let PPLlavaProcessor make it"
        )


def _numbers(name: str, values: Tensor | list, axes: str) -> list:
    """values int, [N] or [N, 2] as `axes` says, as a list."""
    tensor = torch.as_tensor(values)
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not whole or tensor.dim() != axes.count(",") + 1 or (tensor.dim() == 2 and tensor.shape[1] != 2):
        raise ValueError(
            f"{name} must be whole numbers {axes}, got {tensor.dtype} of shape {list(tensor.shape)}; pass it as "
            "PPLlavaProcessor makes it"
        )
    return tensor.tolist()


__all__ = ["Clip", "check_features", "pack_images", "pack_videos"]
