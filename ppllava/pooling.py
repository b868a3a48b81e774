"""How many visual tokens a clip or an image becomes, and through which windows: one answer for model and processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppllava_kernels import pooled_size
from ppllava_kernels.shapes import triple

from .compat import get_anyres_image_grid_shape, unpad_image
from .sampling import check_count

POOLINGS = ("prompt_guided", "adaptive_mean", "temporal_mean", "none")
BUDGETED = ("prompt_guided", "adaptive_mean")  # which can leave any number of tokens
MOST_TOKENS = 2**20  # of one clip; more are no budget but an error
MOST_VIEWS = 2**10  # of one image
SIZES = (
    "pooling_kernel_size",
    "pooling_stride",
    "pooling_output_size",
    "image_pooling_kernel_size",
    "image_pooling_stride",
)


class Window(NamedTuple):
    """Arguments of the ops of `ppllava_kernels`; either kernel_size or output_size is None."""

    kernel_size: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    output_size: tuple[int, ...] | None = None


@dataclass(frozen=True)
class VisualPooling:
    """The pooling of a configuration or a processor, whose fields :class:`PPLlavaConfig` documents.

    grid       (H, W), patches of one frame or view
    view_size  pixels of the edge of one frame or view

    Raises:
        ValueError, TypeError: for a combination that cannot work; the message says what to do.
    """

    grid: tuple[int, int]
    view_size: int
    pooling: str = "prompt_guided"
    pooling_kernel_size: tuple[int, ...] = (2, 3, 3)
    pooling_stride: tuple[int, ...] | None = None
    pooling_output_size: tuple[int, ...] | None = None
    pooling_max_tokens: int | None = None
    image_pooling_kernel_size: tuple[int, ...] | None = None
    image_pooling_stride: tuple[int, ...] | None = None
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, triple(name, getattr(self, name)))
        pinpoints = tuple(tuple(pinpoint) for pinpoint in self.image_grid_pinpoints or ())
        object.__setattr__(self, "image_grid_pinpoints", pinpoints)
        self._check()

    @classmethod
    def of(cls, owner: Any, grid: tuple[int, int], view_size: int) -> VisualPooling:
        """That of a configuration or a processor."""
        names = ("pooling", *SIZES, "pooling_max_tokens", "image_grid_pinpoints")
        return cls(grid, view_size, **{name: getattr(owner, name) for name in names})

    @property
    def guided(self) -> bool:
        return self.pooling == "prompt_guided"

    def video_window(self, frames: int) -> Window:
        """The windows of a clip, larger ones where those would leave more than `pooling_max_tokens` tokens."""
        window, most = self._unbounded_window(frames), self.pooling_max_tokens
        if most is None or math.prod(self.pooled_size(frames, window)) <= most:
            return window
        return Window(output_size=self.fit(most, frames))

    def _unbounded_window(self, frames: int) -> Window:
        """One shorter than the kernel is one window over all of its frames."""
        if self.pooling == "none":
            return Window((1, 1, 1))
        if self.pooling == "temporal_mean":
            return Window(output_size=(1, *self.grid))
        if self.pooling_output_size is not None:
            return Window(output_size=self.pooling_output_size)
        kernel, stride = self.pooling_kernel_size, self.pooling_stride or self.pooling_kernel_size
        if frames < kernel[0]:
            return Window((frames, *kernel[1:]), (frames, *stride[1:]))
        return Window(kernel, stride)

    def image_window(self) -> Window:
        """The windows of each view of an image."""
        if self.pooling in ("none", "temporal_mean"):
            return Window((1, 1, 1))
        if self.pooling == "adaptive_mean":
            return Window(output_size=(1, *self.pooling_output_size[1:]))
        if self.image_pooling_kernel_size is not None:
            return Window(self.image_pooling_kernel_size, self.image_pooling_stride or self.image_pooling_kernel_size)
        kernel = (1, *self.pooling_kernel_size[1:])
        return Window(kernel, self.image_pooling_stride or (1, *(self.pooling_stride or kernel)[1:]))

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
        pinpoints = [list(pinpoint) for pinpoint in self.image_grid_pinpoints]
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
        space, and never more of either than without a budget."""
        steps, height, width = self.pooled_size(frames, self._unbounded_window(frames))
        if tokens < height * width:
            shrink = math.sqrt(tokens / (height * width))
            height = max(1, int(height * shrink))
            width = max(1, min(int(width * shrink), tokens // height))
        return min(steps, max(1, tokens // (height * width))), height, width

    def _check(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        if self.pooling == "adaptive_mean" and self.pooling_output_size is None:
            raise ValueError("pooling_output_size must be given for adaptive_mean, got None; PLLaVA uses (16, 12, 12)")
        if math.prod(self.pooling_output_size or ()) > MOST_TOKENS:
            raise ValueError(
                f"pooling_output_size must be at most {MOST_TOKENS:,} tokens, got {list(self.pooling_output_size)}; "
                "pass a smaller one"
            )
        depth = (self.image_pooling_kernel_size or (1,))[0]
        if depth != 1:
            raise ValueError(
                f"image_pooling_kernel_size must be one frame deep, got {list(self.image_pooling_kernel_size)}; "
                "several would mix the images of a list"
            )
        if self.pooling_max_tokens is not None:
            if self.pooling not in BUDGETED:
                raise ValueError(
                    f"pooling_max_tokens needs one of the poolings {', '.join(BUDGETED)}, got {self.pooling!r}; leave "
                    "it None, and sample fewer frames"
                )
            check_count("pooling_max_tokens", self.pooling_max_tokens)
        own = "pooling_kernel_size" if self.image_pooling_kernel_size is None else "image_pooling_kernel_size"
        windows = {"pooling_kernel_size": self._unbounded_window(2**31 - 1), own: self.image_window()}
        for name, window in windows.items():
            if window.kernel_size and any(k > n for k, n in zip(window.kernel_size[1:], self.grid)):
                image = "" if window.output_size or name != own or self.pooling_output_size is None else " for images"
                remedy = "image_pooling_kernel_size" if image else "pooling_output_size"
                raise ValueError(
                    f"{name} must fit into the {self.grid[0]} x {self.grid[1]} patches of a frame{image}, got "
                    f"{list(getattr(self, name))}; use a smaller one, or {remedy}"
                )
        for pinpoint in self.image_grid_pinpoints:
            if len(pinpoint) != 2 or any(n < 1 or n % self.view_size for n in pinpoint):
                raise ValueError(
                    f"image_grid_pinpoints must be [height, width] in multiples of the {self.view_size} pixels of a "
                    f"view, got {list(pinpoint)}; round it"
                )
            if math.prod([n // self.view_size for n in pinpoint]) > MOST_VIEWS:  # a list: Dynamo traces it
                raise ValueError(
                    f"image_grid_pinpoints must be grids of at most {MOST_VIEWS:,} views, got {list(pinpoint)} pixels; "
                    "pass a smaller one"
                )


__all__ = ["BUDGETED", "POOLINGS", "SIZES", "VisualPooling", "Window"]
