"""How many visual tokens a clip or an image becomes, and through which windows: one answer for model and processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ppllava_kernels import pooled_size

POOLINGS = ("prompt_guided", "adaptive_mean", "temporal_mean", "none")


class Window(NamedTuple):
    """Arguments of the ops of `ppllava_kernels`; either kernel_size or output_size is None."""

    kernel_size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    output_size: tuple[int, ...] | None = None


def frozen(size: Sequence | None) -> tuple | None:
    """Lists, as JSON has them, as tuples."""
    return None if size is None else tuple(frozen(n) if isinstance(n, (list, tuple)) else n for n in size)


@dataclass(frozen=True)
class VisualPooling:
    """The pooling of a configuration, as :class:`PPLlavaConfig` documents its fields.

    grid            (H, W), patches of one frame or view
    view_size       pixels of the edge of one frame or view
    grid_pinpoints  (height, width) in pixels of the grids of views an image may be cut into
    """

    mode: str
    grid: tuple[int, int]
    view_size: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    output_size: tuple[int, ...] | None = None
    image_kernel_size: tuple[int, ...] | None = None
    image_stride: tuple[int, ...] | None = None
    grid_pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def guided(self) -> bool:
        return self.mode == "prompt_guided"

    def video_window(self, frames: int) -> Window:
        """The windows of a clip; one shorter than the kernel is one window over all of its frames."""
        if self.mode == "none":
            return Window((1, 1, 1))
        if self.mode == "temporal_mean":
            return Window(output_size=(1, *self.grid))
        if self.output_size is not None:
            return Window(output_size=tuple(self.output_size))
        stride = tuple(self.stride or self.kernel_size)
        if frames < self.kernel_size[0]:
            return Window((frames, *self.kernel_size[1:]), (frames, *stride[1:]))
        return Window(tuple(self.kernel_size), stride)

    def image_window(self) -> Window:
        """The windows of each view of an image."""
        if self.mode in ("none", "temporal_mean"):
            return Window((1, 1, 1))
        if self.mode == "adaptive_mean":
            return Window(output_size=(1, *self.output_size[1:]))
        kernel = self.image_kernel_size or (1, *self.kernel_size[1:])
        stride = self.image_stride or (kernel if self.image_kernel_size else (1, *(self.stride or kernel)[1:]))
        return Window(tuple(kernel), tuple(stride))

    def pooled_size(self, frames: int, window: Window) -> tuple[int, ...]:
        """(To, Ho, Wo) of a clip."""
        return pooled_size((frames, *self.grid), **window._asdict())

    def video_tokens(self, frames: int) -> int:
        """Visual tokens of a clip."""
        return math.prod(self.pooled_size(frames, self.video_window(frames)))

    def image_tokens(self, size: Sequence[int], views: int, in_list: bool = False) -> int:
        """Visual tokens of an image of `size` (height, width) in so many views, or as one of an image list."""
        shape = self.pooled_size(1, self.image_window())[1:]
        tokens = torch.empty(views, *shape, 1, device="meta")  # [views, h, w, 1]
        return len(self.arrange(tokens, None if in_list else torch.empty(1, device="meta"), size))

    def view_grid(self, size: Sequence[int]) -> tuple[int, int]:
        """(rows, columns) of the grid of views that an image of `size` (height, width) is cut into."""
        pinpoints = [list(pinpoint) for pinpoint in self.grid_pinpoints]
        return get_anyres_image_grid_shape(tuple(size), pinpoints, self.view_size)

    def arrange(self, tokens: Tensor, newline: Tensor | None, size: Sequence[int]) -> Tensor:
        """The tokens of an image in the order the language model reads them: [tokens, D].

        Args:
            tokens: [views, h, w, D], the base view first, then the grid of views row by row.
            newline: [D], after each row of the grid, which loses the padding of the image; after a single view. None
                is for an image of a list: its one view as it is.
            size: (height, width) of the image before preprocessing.
        """
        base = tokens[0].flatten(0, 1)  # [h * w, D]
        if newline is None:
            return base
        if len(tokens) == 1:
            return torch.cat([base, newline[None]])
        grid = tokens[1:].unflatten(0, self.view_grid(size))  # [rows, columns, h, w, D]
        grid = unpad_image(grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2), tuple(size))  # [D, y, x]
        lines = torch.cat([grid, newline[:, None, None].expand(*grid.shape[:2], 1)], dim=-1)  # [D, y, x + 1]
        return torch.cat([base, lines.flatten(1).T])

    def fit(self, tokens: int, frames: int) -> tuple[int, int, int]:
        """An output_size of at most `tokens` tokens for a clip of so many frames: first fewer steps in time, then in
        space, and never more of either than the kernel would leave."""
        steps, height, width = self.pooled_size(max(frames, self.kernel_size[0]), Window(self.kernel_size, self.stride))
        if tokens < height * width:
            shrink = math.sqrt(tokens / (height * width))
            height = max(1, int(height * shrink))
            width = max(1, min(int(width * shrink), tokens // height))
        return min(steps, max(1, tokens // (height * width))), height, width


__all__ = ["POOLINGS", "VisualPooling", "Window", "frozen"]
