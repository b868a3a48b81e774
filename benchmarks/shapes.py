"""Named workloads. Tests, benchmarks and docs take their shapes from here and invent none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ppllava_kernels import pooled_size

Triple = tuple[int, int, int]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DIRECTIONS = ("forward", "backward")
# For each op its tensors among the fields of Inputs, in the order of its arguments; all of them get gradients.
OPS = {
    "prompt_relevance": ("image_embeds", "text_embeds"),
    "weighted_pool3d": ("values", "weights"),
    "prompt_guided_pool3d": ("values", "image_embeds", "text_embeds"),
}


@dataclass(frozen=True)
class Shape:
    """Videos of `frames` frames on a grid of `height` x `width` patches, pooled by one kind of window."""

    name: str
    what: str
    frames: tuple[int, ...]  # of each video; equal ones make a dense batch [B, T, ...], others a packed one [F, ...]
    height: int
    width: int
    guide_channels: int  # C, of image_embeds and text_embeds
    channels: int  # D, of values
    kernel_size: Triple | None = None  # also the stride
    output_size: Triple | None = None

    @property
    def batch(self) -> int:
        return len(self.frames)

    @property
    def ragged(self) -> bool:
        return len(set(self.frames)) > 1

    @property
    def window(self) -> dict[str, Triple]:
        """The window arguments of the ops."""
        return {"output_size": self.output_size} if self.kernel_size is None else {"kernel_size": self.kernel_size}

    @property
    def grid(self) -> tuple[int, ...]:
        """[B, T, H, W], or [F, H, W] of a ragged batch."""
        lead = (sum(self.frames),) if self.ragged else (self.batch, self.frames[0])
        return *lead, self.height, self.width

    @property
    def pooled_sizes(self) -> list[Triple]:
        """(To, Ho, Wo) of each video."""
        return [pooled_size((t, self.height, self.width), **self.window) for t in self.frames]

    def output_shape(self, op: str) -> tuple[int, ...]:
        """Of the relevance, or of the pooled values: [B, To, Ho, Wo, D], or [Fo, Ho, Wo, D] of a ragged batch."""
        if op == "prompt_relevance":
            return self.grid
        sizes = self.pooled_sizes
        packed = self.ragged and self.output_size is None
        lead = (sum(size[0] for size in sizes),) if packed else (self.batch, sizes[0][0])
        return *lead, *sizes[0][1:], self.channels

    @property
    def tokens(self) -> int:
        return sum(self.frames) * self.height * self.width

    @property
    def pooled_tokens(self) -> int:
        return sum(prod(size) for size in self.pooled_sizes)

    @property
    def covered_tokens(self) -> int:
        """Patches that lie in a window; the leftover ones need not be read."""
        return self.tokens if self.kernel_size is None else self.window_tokens

    @property
    def window_tokens(self) -> int:
        """Patches of all windows, counted once for each window that they lie in."""
        if self.kernel_size is not None:
            return self.pooled_tokens * prod(self.kernel_size)

        def spans(n: int, outputs: int) -> int:
            return sum(-(-(o + 1) * n // outputs) - o * n // outputs for o in range(outputs))

        sizes = [(frames, self.height, self.width) for frames in self.frames]
        return sum(prod(spans(n, o) for n, o in zip(size, self.output_size)) for size in sizes)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("vicuna7b_video", "PPLLaVA-Vicuna-7B, 32 frames", (32,), 24, 24, 768, 4096, (2, 3, 3)),
        Shape("vicuna7b_16frames", "PPLLaVA-Vicuna-7B, 16 frames", (16,), 24, 24, 768, 4096, (2, 3, 3)),
        Shape("vicuna7b_8frames", "PPLLaVA-Vicuna-7B, 8 frames", (8,), 24, 24, 768, 4096, (2, 3, 3)),
        Shape("vicuna7b_image", "PPLLaVA-Vicuna-7B, one image", (1,), 24, 24, 768, 4096, (1, 3, 3)),
        Shape("qwen2_7b_video", "PPLLaVA-Qwen2-7B on SigLIP, 32 frames", (32,), 27, 27, 1152, 3584, (2, 3, 3)),
        Shape("long_video", "256 frames into 1,024 tokens", (256,), 24, 24, 768, 4096, None, (16, 8, 8)),
        Shape("batch4_ragged", "four clips of different length", (32, 9, 17, 24), 24, 24, 768, 4096, (2, 3, 3)),
        Shape("small_video", "a quick run", (8,), 12, 12, 256, 1024, (2, 3, 3)),
        Shape("tiny_video", "for tests", (4, 4), 6, 9, 16, 32, (2, 3, 3)),
        Shape("tiny_image", "for tests", (1,), 6, 6, 16, 32, (1, 3, 3)),
        Shape("tiny_ragged", "for tests, with leftover frames", (3, 5, 2), 6, 6, 16, 32, (2, 3, 3)),
        Shape("tiny_adaptive", "for tests, windows that overlap", (5,), 7, 6, 16, 32, None, (2, 3, 3)),
    )
}
FULL_SHAPES = tuple(name for name in SHAPES if not name.startswith(("small_", "tiny_")))
CPU_SHAPES = ("vicuna7b_8frames",)


@dataclass(frozen=True)
class Inputs:
    values: Tensor  # [B, T, H, W, D] or [F, H, W, D]
    image_embeds: Tensor  # [B, T, H, W, C] or [F, H, W, C]
    text_embeds: Tensor  # [B, C]
    weights: Tensor  # [B, T, H, W] or [F, H, W], float32: the relevance of these embeddings
    cu_frames: Tensor | None  # [B+1], int32 on the CPU, where the batch is ragged

    def of(self, op: str) -> tuple[Tensor, ...]:
        """The tensors of `op` in the order of its arguments."""
        return tuple(getattr(self, name) for name in OPS[op])


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs whose cosines spread as those of CLIP do: mean 0.2, standard deviation 0.02 within a video."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    text = randn(shape.batch, shape.guide_channels)  # [B, C]
    video = torch.repeat_interleave(torch.arange(shape.batch), torch.tensor(shape.frames)).to(device)  # [F]
    axis = torch.nn.functional.normalize(text, dim=-1)[video, None, None]  # [F, 1, 1, C]
    cosine = 0.2 + 0.02 * randn(sum(shape.frames), shape.height, shape.width)  # [F, H, W]
    noise = randn(*cosine.shape, shape.guide_channels)  # [F, H, W, C]
    noise = torch.nn.functional.normalize(noise - (noise * axis).sum(-1, keepdim=True) * axis, dim=-1)
    length = 10 * (1 + 0.1 * randn(*cosine.shape, 1))  # [F, H, W, 1]
    image = length * (cosine[..., None] * axis + (1 - cosine.square()).sqrt()[..., None] * noise)  # [F, H, W, C]
    weights = torch.cat([(100 * x).flatten().softmax(0).view_as(x) for x in cosine.split(shape.frames)])  # [F, H, W]
    ends = [0, *torch.tensor(shape.frames).cumsum(0).tolist()]
    return Inputs(
        values=randn(*shape.grid, shape.channels).to(dtype),
        image_embeds=image.to(dtype).view(*shape.grid, -1),
        text_embeds=text.to(dtype),
        weights=weights.view(shape.grid),
        cu_frames=torch.tensor(ends, dtype=torch.int32) if shape.ragged else None,
    )


def traffic(op: str, shape: Shape, dtype: torch.dtype, direction: str) -> tuple[dict[str, int], dict[str, int]]:
    """(read, written) bytes of each tensor that any implementation moves: inputs read once, outputs written once."""
    size, relevance = dtype.itemsize, 4
    row = shape.channels * size
    whole = {
        "values": shape.tokens * row,
        "weights": shape.tokens * relevance,
        "image_embeds": shape.tokens * shape.guide_channels * size,
        "text_embeds": shape.batch * shape.guide_channels * size,
    }
    # Patches that lie in no window need not be read; their gradient, 0, is written.
    covered = whole | {"values": shape.covered_tokens * row, "weights": shape.covered_tokens * relevance}
    read = {name: (whole if op == "prompt_relevance" else covered)[name] for name in OPS[op]}
    scores = {"relevance": shape.tokens * relevance}
    output = scores if op == "prompt_relevance" else {"pooled": shape.pooled_tokens * row}
    if direction == "forward":
        return read, output
    saved = {} if op == "weighted_pool3d" else scores  # the softmax, from the forward
    gradient = {f"gradient of {name}": moved for name, moved in output.items()}
    return gradient | saved | read, {f"gradient of {name}": whole[name] for name in OPS[op]}


def moved_bytes(op: str, shape: Shape, dtype: torch.dtype, direction: str) -> int:
    return sum(sum(tensors.values()) for tensors in traffic(op, shape, dtype, direction))


def flops(op: str, shape: Shape, direction: str) -> int:
    """Floating point operations of the vectors; those on single scores (softmax) are left out."""
    if op == "prompt_guided_pool3d":
        return sum(flops(part, shape, direction) for part in ("prompt_relevance", "weighted_pool3d"))
    if op == "prompt_relevance":
        # forward: e.c and e.e; backward: a*c + b*e for the patch, c.grad summed over patches
        return shape.tokens * shape.guide_channels * {"forward": 4, "backward": 5}[direction]
    # forward: share * v summed; backward: share * grad, and v.grad
    return shape.window_tokens * shape.channels * {"forward": 2, "backward": 3}[direction]


# ---- the projector

PROJECT = "prompt_guided_project"
BOTH = "both"  # forward and all gradients in one timed call
# For each tensor its axes: V of features, C of the guide, M of its MLP, H between the layers, D of the tokens.
CLIP_GUIDE = {"norm_weight": "V", "norm_bias": "V", "guide_weight": "CV"}
SIGLIP_GUIDE = {
    **{"norm_weight": "V", "norm_bias": "V", "value_weight": "CV", "value_bias": "C"},
    **{"mlp_norm_weight": "C", "mlp_norm_bias": "C"},
    **{"fc1_weight": "MC", "fc1_bias": "M", "fc2_weight": "CM", "fc2_bias": "C"},
}
LAYERS = {"linear_1_weight": "HV", "linear_1_bias": "H", "linear_2_weight": "DH", "linear_2_bias": "D"}


class Product(NamedTuple):
    """[rows, inner] by the transpose of the weight [outer, inner]."""

    rows: int
    weight: str
    inner: int
    outer: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.outer


@dataclass(frozen=True)
class ProjectorShape(Shape):
    """From the features of a vision tower: guide_channels is C, channels is D."""

    feature_channels: int = 0  # V
    hidden_channels: int = 0  # D', between the layers of the projector
    mlp_channels: int = 0  # M, of SigLIP's guide, e = v + MLP(LN'(v)); 0: CLIP's, e = P LN(x)

    @property
    def guide(self) -> dict[str, str]:
        return SIGLIP_GUIDE if self.mlp_channels else CLIP_GUIDE

    @property
    def axes(self) -> dict[str, str]:
        """Of all tensors, in the order of their gradients; of features [B, T, H, W, V] and text_embeds the last."""
        return {"features": "V", "text_embeds": "C", **self.guide, **LAYERS}

    @property
    def axis_sizes(self) -> dict[str, int]:
        sizes = (self.feature_channels, self.guide_channels, self.mlp_channels, self.hidden_channels, self.channels)
        return dict(zip("VCMHD", sizes))

    def products(self, original: bool = False) -> list[Product]:
        """The matrix products that no implementation avoids; the original has the last one on all patches."""
        lead = [(self.tokens, name) for name, axes in self.guide.items() if len(axes) == 2]
        lead += [(self.tokens, "linear_1_weight"), (self.tokens if original else self.pooled_tokens, "linear_2_weight")]
        sizes = self.axis_sizes
        return [Product(rows, name, *(sizes[axis] for axis in reversed(self.axes[name]))) for rows, name in lead]

    def project_flops(self, direction: str, original: bool = False) -> int:
        """Of the products; those of norms, gelu and pooling are left out. The gradient of each factor is one, too."""
        return (1 if direction == "forward" else 3) * sum(product.flops for product in self.products(original))

    def first_windows(self) -> ProjectorShape:
        """The same with frames for one window only, of which original and reference agree or not."""
        if self.kernel_size is not None:
            return replace(self, frames=(self.kernel_size[0],))
        kernel = tuple(n // o for n, o in zip((self.frames[0], self.height, self.width), self.output_size))
        return replace(self, frames=(kernel[0],), kernel_size=kernel, output_size=None)


# V, C, D, D', M of each family, and the windows of an hour of video
FAMILIES = {
    "vicuna7b": ("PPLLaVA-Vicuna-7B on CLIP", 24, (1024, 768, 4096, 4096, 0), (16, 8, 8)),
    "qwen2_7b": ("PPLLaVA-Qwen2-7B on SigLIP", 27, (1152, 1152, 3584, 3584, 4304), (16, 9, 9)),
}
SHORT, LONG = (8, 32, 128), (256, 1024, 3600)


def _projector(name: str, what: str, frames: int, side: int, sizes: tuple[int, ...], output_size: Triple | None = None):
    v, c, d, hidden, mlp = sizes
    window = (None, output_size) if output_size else ((2, 3, 3), None)
    return ProjectorShape(name, what, (frames,), side, side, c, d, *window, v, hidden, mlp)


PROJECTORS = {
    shape.name: shape
    for shape in (
        *(
            _projector(f"{name}_{frames}frames", f"{what}, {frames} frames", frames, side, sizes, window)
            for name, (what, side, sizes, long) in FAMILIES.items()
            for some, window in ((SHORT, None), (LONG, long))
            for frames in some
        ),
        _projector("small_clip", "a quick run", 8, 12, (256, 192, 512, 768, 0)),
        _projector("small_siglip", "a quick run", 8, 12, (256, 256, 512, 512, 640)),
        _projector("tiny_clip", "for tests, with a leftover frame", 5, 6, (32, 24, 16, 40, 0)),
        _projector("tiny_siglip", "for tests", 4, 6, (24, 24, 32, 40, 56)),
        _projector("tiny_long", "for tests, into a fixed number of tokens", 8, 6, (32, 24, 16, 40, 0), (2, 2, 2)),
    )
}
