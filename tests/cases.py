"""One generator of inputs for every kind of test: named edge shapes, dtypes and layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    size: tuple[int, ...]  # (B, T, H, W), or (F, H, W) with cu_frames
    channels: tuple[int, int] = (24, 40)  # C, D
    window: dict = field(default_factory=lambda: dict(kernel_size=(2, 3, 3)))
    cu_frames: tuple[int, ...] | None = None

    @property
    def batch(self) -> int:
        return self.size[0] if self.cu_frames is None else len(self.cu_frames) - 1

    @property
    def widths(self) -> dict[str, int]:
        """C and D; V of the features and E of the projector's first layer."""
        c, d = self.channels
        return dict(C=c, D=d, V=d, E=c + d)


CASES = {
    "divisible": Case((2, 2, 3, 6)),
    "leftover": Case((1, 3, 4, 7)),
    "overlap": Case((1, 3, 3, 5), window=dict(kernel_size=(2, 2, 3), stride=(1, 1, 2))),
    "gaps": Case((1, 3, 5, 6), window=dict(kernel_size=(1, 2, 2), stride=(2, 3, 3))),
    "image": Case((2, 1, 3, 6), window=dict(kernel_size=(1, 3, 3))),
    "global": Case((2, 2, 3, 4), window=dict(kernel_size=(2, 3, 4), stride=1)),
    "single": Case((1, 1, 1, 1), (1, 1), window=dict(kernel_size=1)),
    "identity": Case((1, 2, 2, 3), window=dict(kernel_size=1)),
    "adaptive": Case((2, 4, 2, 3), window=dict(output_size=(2, 1, 3))),
    "adaptive_overlap": Case((1, 5, 2, 3), window=dict(output_size=(2, 2, 2))),
    "adaptive_up": Case((1, 2, 2, 3), window=dict(output_size=(3, 4, 1))),
    "adaptive_large": Case((1, 5, 4, 4), window=dict(output_size=1)),
    "ragged": Case((9, 3, 4), cu_frames=(0, 2, 5, 9), window=dict(kernel_size=(2, 3, 2))),
    "ragged_one_frame": Case((4, 2, 3), cu_frames=(0, 1, 4), window=dict(kernel_size=(1, 2, 1), stride=(2, 1, 2))),
    "ragged_adaptive": Case((9, 3, 2), cu_frames=(0, 1, 8, 9), window=dict(output_size=(3, 2, 2))),
    "odd_channels": Case((1, 2, 3, 3), (33, 77)),
    "many_channels": Case((1, 2, 3, 3), (300, 1100)),
}

LOW = ("divisible", "leftover", "overlap", "adaptive_overlap", "ragged_adaptive", "odd_channels", "many_channels")
REST = ("leftover", "adaptive_up", "ragged")

# dtypes of values, image_embeds, text_embeds and weights
DTYPES = {
    "fp32": (F32, F32, F32, F32),
    "fp16": (F16, F16, F16, F32),
    "bf16": (BF16, BF16, BF16, F32),
    "mixed": (BF16, F32, F16, BF16),
    "fp64": (F64, F64, F64, F64),
}


def matrix(cases, low=LOW, rest=REST) -> list[tuple[str, str]]:
    """(case, dtypes): every case in float32, some in bfloat16, and some in all that is left.

    A case reaches another branch of a kernel and a dtype another instance of it: no pair of both reaches a third.
    """
    pairs = [*((case, "fp32") for case in cases), *((case, "bf16") for case in low)]
    return pairs + [(case, dtypes) for case in rest for dtypes in ("fp16", "mixed", "fp64")]


def contiguous(x):
    return x


def permuted(x):
    """Frames innermost but for the channels, as after a transpose."""
    axes = list(range(x.dim()))
    moved = [*axes[1:-1], axes[0], axes[-1]]
    return x.permute(moved).contiguous().permute([moved.index(n) for n in axes])


def sliced(x):
    """A view into a larger buffer with an odd offset: rows are not aligned, neighbours are NaN."""
    buffer = x.new_full([n + 2 for n in x.shape], torch.nan)
    view = buffer[tuple(slice(1, n + 1) for n in x.shape)]
    view.copy_(x)
    return view


def expanded(x):
    """One video for the whole batch, without a copy: batch stride 0."""
    return x[:1].expand(x.shape)


LAYOUTS = dict(contiguous=contiguous, permuted=permuted, sliced=sliced, expanded=expanded)


# The channel axes, the last ones, of every tensor.
AXES = {
    "values": "D",
    "image_embeds": "C",
    "text_embeds": "C",
    "features": "V",
    "norm_weight": "V",
    "norm_bias": "V",
    "guide_weight": "CV",
    "linear_1_weight": "EV",
    "linear_1_bias": "E",
    "linear_2_weight": "DE",
    "linear_2_bias": "D",
}
LAYERS = ("linear_1_weight", "linear_1_bias", "linear_2_weight", "linear_2_bias")
GUIDE = ("norm_weight", "norm_bias", "guide_weight")


def make_inputs(case: Case, dtypes=DTYPES["fp32"], seed: int = 0) -> dict[str, torch.Tensor]:
    """values, image_embeds, text_embeds, weights and logit_scale on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=F64, device="cpu", generator=generator)

    c, d = case.channels
    weights = normal(*case.size).flatten(1).softmax(1).view(case.size)
    tensors = dict(
        values=normal(*case.size, d),
        image_embeds=normal(*case.size, c),
        text_embeds=normal(case.batch, c),
        weights=weights,
    )
    tensors = {name: x.to(dtype) for (name, x), dtype in zip(tensors.items(), dtypes)}
    return tensors | {"logit_scale": torch.tensor(5.0, dtype=torch.promote_types(dtypes[1], F32), device="cpu")}


def make_projector_inputs(case: Case, dtypes=DTYPES["fp32"], seed: int = 0) -> dict[str, torch.Tensor]:
    """features and all weights in the first of dtypes, text_embeds, weights and logit_scale, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in ("features", *GUIDE, *LAYERS):
        shape = [case.widths[axis] for axis in AXES[name]]
        lead = case.size if name == "features" else ()
        x = torch.randn((*lead, *shape), dtype=F64, device="cpu", generator=generator)
        tensors[name] = (x / shape[-1] ** 0.5 if len(shape) == 2 else x).to(dtypes[0])
    others = make_inputs(case, dtypes, seed)
    others["logit_scale"] = others["logit_scale"].to(torch.promote_types(dtypes[0], F32))
    return tensors | {name: others[name] for name in ("text_embeds", "weights", "logit_scale")}


def cu_frames_of(case: Case) -> torch.Tensor | None:
    return None if case.cu_frames is None else torch.tensor(case.cu_frames, dtype=torch.int32)


OPS = {
    "prompt_relevance": ("image_embeds", "text_embeds", "logit_scale"),
    "weighted_pool3d": ("values", "weights"),
    "prompt_guided_pool3d": ("values", "image_embeds", "text_embeds", "logit_scale"),
    "prompt_guided_project": ("features", "text_embeds", *GUIDE, *LAYERS, "logit_scale"),
    "weighted_project": ("features", "weights", *LAYERS),
}
RELEVANCE = ("prompt_guided_pool3d", "prompt_guided_project")


def make(op: str, case: Case, dtypes=DTYPES["fp32"], seed: int = 0) -> dict[str, torch.Tensor]:
    """The inputs of an op, and those of its neighbours."""
    return (make_projector_inputs if op.endswith("project") else make_inputs)(case, dtypes, seed)


def with_layouts(*cases: str) -> list:
    """(case, layout) parameters; packed clips share no batch axis to expand."""
    return [(c, x) for c in cases for x in LAYOUTS if x != "expanded" or CASES[c].cu_frames is None]
