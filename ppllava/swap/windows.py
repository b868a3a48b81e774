"""The windows over the token grid of another video LLM, and the pooling of its tokens through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ppllava_kernels import weighted_pool3d
from ppllava_kernels.checks import check_temperature
from ppllava_kernels.shapes import Window, check_fits, make_window, output_shape

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Windows:
    """The windows of `ppllava.compress`, the same for the processor, which counts tokens, and the model."""

    window: Window
    temperature: float

    @classmethod
    def of(cls, kernel_size, stride, output_size, temperature: float) -> Windows:
        """From the arguments of the ops, which they check."""
        return cls(make_window(kernel_size, stride, output_size), check_temperature(temperature))

    def at(self, size: Size) -> Window:
        """Those of a clip of size (T, H, W); one shorter than the kernel is one window over all of its frames."""
        kernel, stride, output_size = self.window
        if kernel and size[0] < kernel[0]:
            return Window((size[0], *kernel[1:]), (size[0], *stride[1:]), output_size)
        return self.window

    def pooled_size(self, size: Size) -> Size:
        """(To, Ho, Wo) of a clip of size (T, H, W).

        Raises:
            ValueError: where the kernel is larger than a frame.
        """
        window = self.at(size)
        check_fits("the tokens of a frame", size, window)
        return output_shape(size, *window)

    def frames(self, size: Size) -> list[tuple[int, int]]:
        """[first, last) of the T frames in each of the To windows of a clip of size (T, H, W)."""
        total, steps = size[0], self.pooled_size(size)[0]
        kernel, stride, output_size = self.at(size)
        if output_size:
            return [(o * total // steps, -(-(o + 1) * total // steps)) for o in range(steps)]
        return [(o * stride[0], o * stride[0] + kernel[0]) for o in range(steps)]

    def step(self, size: Size) -> float:
        """Frames from one window in time to the next."""
        _, stride, output_size = self.at(size)
        return size[0] / output_size[0] if output_size else float(stride[0])

    def pool(self, values: Tensor, relevance: Tensor | None, sizes: Sequence[Size]) -> list[Tensor]:
        """Pool the tokens of clips; one ragged op call for all clips of one grid and one window.

        Args:
            values: [N, D], the tokens of all clips, each of size (T, H, W) in row-major order.
            relevance: [N], or None for the plain mean.
            sizes: (T, H, W) of each clip.

        Returns:
            of each clip [To, Ho, Wo, D].
        """
        if relevance is not None:
            relevance = relevance.to(values.device, torch.promote_types(values.dtype, torch.float32))
        groups: dict[tuple, list[int]] = {}
        for i, size in enumerate(sizes):
            self.pooled_size(size)
            groups.setdefault((size[1:], self.at(size)), []).append(i)
        lengths = [math.prod(size) for size in sizes]
        pooled: list[Tensor] = [values] * len(sizes)
        for (_, window), chosen in groups.items():
            rows, weights = values, relevance
            if len(groups) > 1:
                parts = values.split(lengths)
                rows = torch.cat([parts[i] for i in chosen])
                parts = None if relevance is None else relevance.split(lengths)
                weights = None if parts is None else torch.cat([parts[i] for i in chosen])
            for i, clip in zip(chosen, self._pool(rows, weights, [sizes[i] for i in chosen], window)):
                pooled[i] = clip
        return pooled

    def _pool(self, values: Tensor, relevance: Tensor | None, sizes: list[Size], window: Window) -> Sequence[Tensor]:
        grid = sizes[0][1:]
        frames = [size[0] for size in sizes]
        values = values.unflatten(0, (sum(frames), *grid))  # [F, H, W, D]
        if relevance is not None:
            relevance = relevance.unflatten(0, (sum(frames), *grid))  # [F, H, W]
        names = {name: value or None for name, value in window._asdict().items()}
        # On the CPU, where the op reads it without a synchronisation.
        cu_frames = torch.tensor([0, *accumulate(frames)], dtype=torch.int32, device="cpu")  # [B+1]
        pooled = weighted_pool3d(values, relevance, temperature=self.temperature, cu_frames=cu_frames, **names)
        if window.output_size:
            return pooled.unbind(0)  # of [B, To, Ho, Wo, D]
        return pooled.split([output_shape(size, *window)[0] for size in sizes])  # of [Fo, Ho, Wo, D]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat, without a copy of a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def resample(relevance: Tensor, grid: tuple[int, int]) -> Tensor:
    """relevance [F, h, w] on another grid [F, H, W], with the same sum in each frame: each token gets of a patch the
    share of its area that lies in the token."""
    (height, width), (rows, columns) = relevance.shape[1:], grid
    if (height, width) == (rows, columns):
        return relevance
    down, across = _shares(height, rows, relevance), _shares(width, columns, relevance)  # [H, h], [W, w]
    return down @ relevance @ across.T


def _shares(patches: int, tokens: int, like: Tensor) -> Tensor:
    """[tokens, patches]: the share of each patch that lies in each token, both spread over one length."""
    o = torch.arange(tokens, device=like.device)[:, None]
    i = torch.arange(patches, device=like.device)
    overlap = torch.minimum((o + 1) * patches, (i + 1) * tokens) - torch.maximum(o * patches, i * tokens)
    return overlap.clamp(min=0).to(like.dtype) / tokens


__all__ = ["Windows", "joined", "resample"]
