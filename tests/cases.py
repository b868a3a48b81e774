"""One generator of inputs for every kind of test: named edge shapes, dtypes and layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from close import assert_close

import ppllava_kernels
from benchmarks.gate import nudged

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
    "divisible": Case((2, 4, 3, 6)),
    "leftover": Case((1, 5, 4, 7)),
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

# dtypes of values, image_embeds, text_embeds and weights
DTYPES = {
    "fp32": (F32, F32, F32, F32),
    "fp16": (F16, F16, F16, F32),
    "bf16": (BF16, BF16, BF16, F32),
    "mixed": (BF16, F32, F16, BF16),
    "fp64": (F64, F64, F64, F64),
}


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


RUNS = 8  # of eager PyTorch and of nudged inputs: enough that their largest error is no matter of luck

OPS = {
    "prompt_relevance": ("image_embeds", "text_embeds", "logit_scale"),
    "weighted_pool3d": ("values", "weights"),
    "prompt_guided_pool3d": ("values", "image_embeds", "text_embeds", "logit_scale"),
    "prompt_guided_project": ("features", "text_embeds", *GUIDE, *LAYERS, "logit_scale"),
    "weighted_project": ("features", "weights", *LAYERS),
}
RELEVANCE = ("prompt_guided_pool3d", "prompt_guided_project")


def run(op: str, case: Case, tensors: dict, backend: str | None = None, directions=None, seed=0, **options) -> dict:
    """Outputs of an op and, for a fixed random loss, the gradients of all its inputs.

    directions: order of the channels of the loss, where the channels of values were reordered.
    seed: where it is not 0 the loss is also scaled for backward and its gradients are scaled back.
    """
    inputs = {name: tensors[name].detach().requires_grad_() for name in OPS[op] if tensors[name] is not None}
    arguments = {name: inputs.get(name) for name in OPS[op]}
    if op != "prompt_relevance":
        options |= case.window
    if op in RELEVANCE:
        options |= dict(return_relevance=True)
    if op == "prompt_guided_project":
        options |= dict(norm_eps=1e-5)
    result = getattr(ppllava_kernels, op)(**arguments, cu_frames=cu_frames_of(case), backend=backend, **options)
    outputs = dict(zip(("output", "relevance"), result if isinstance(result, tuple) else (result,)))
    high = all(out.dtype in (F32, F64) for out in outputs.values())
    factor = 1 + seed / 10 if high else 1  # in low precision the scaled loss would be another one
    loss = 0
    for n, out in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(n)
        direction = torch.randn(out.shape, generator=generator).to(BF16)  # the same numbers in every dtype
        if directions is not None and op != "prompt_relevance" and n == 0:
            direction = direction[..., directions]
        loss = loss + (out * (factor * direction.to(out))).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()))
    grads = {f"grad of {k}": g if factor == 1 else g.double() / factor for k, g in zip(inputs, grads)}
    return {k: v.detach() for k, v in outputs.items()} | grads


def check(op: str, case: Case, tensors: dict, place: tuple[str, str], layout=contiguous, **options) -> None:
    """Values and gradients of an op on a backend, by the one tolerance rule."""
    backend, device = place
    tensors = {name: x if x is None or x.dim() < 2 else layout(x) for name, x in tensors.items()}
    there = {name: x if x is None else layout_preserving_copy(x, device) for name, x in tensors.items()}
    actual = run(op, case, there, backend, **options)
    exact = run(op, case, cast(tensors, F64), "reference", **options)
    eager = eager_runs(op, case, tensors, **options)
    if tensors[OPS[op][0]].dtype == F64:
        # Nothing is more exact than float64, and `exact` has its error, too: eager's is also float32's, scaled by the
        # two eps, and counted twice.
        single, ratio = cast(tensors, F32), 2 * torch.finfo(F64).eps / torch.finfo(F32).eps
        exact32 = run(op, case, cast(single, F64), "reference", **options)
        eager += [
            {name: exact[name] + ratio * (x.double() - exact32[name]) for name, x in outputs.items()}
            for outputs in eager_runs(op, case, single, **options)
        ]
    moved = [
        run(op, case, {k: x if x is None else nudged(x, seed) for k, x in tensors.items()}, "reference", **options)
        for seed in range(RUNS)
    ]
    for name in exact:
        others = [outputs[name] for outputs in (*eager, *moved)]
        assert_close(f"{op} {backend} {name}", actual[name], others, exact[name])


def check_dtypes(op: str, case: Case, dtypes: str, place: tuple[str, str]) -> None:
    """`check` for named dtypes; on a GPU float64 must be refused, in one sentence, and never computed in less."""
    make = make_projector_inputs if op.endswith("project") else make_inputs
    tensors = make(case, DTYPES[dtypes])
    backend = place[0]
    if dtypes != "fp64" or backend == "cpp":
        check(op, case, tensors, place)
        return
    message = rf"^backend='{backend}' cannot run: {backend} computes in float32 and got float64"
    with pytest.raises(ValueError, match=message):
        run(op, case, {name: x.to(place[1]) for name, x in tensors.items()}, backend)


def with_layouts(*cases: str) -> list:
    """(case, layout) parameters; packed clips share no batch axis to expand."""
    return [(c, x) for c in cases for x in LAYOUTS if x != "expanded" or CASES[c].cu_frames is None]


def eager_runs(op: str, case: Case, tensors: dict, **options) -> list[dict]:
    """The reference on the same inputs with their channels in several orders and the loss in several scales.

    Both change nothing but roundings, so that together they show eager's error without its luck. Matrix products round
    in between, to the dtype, which no order changes: those of the projector get inputs moved by an eps of that dtype,
    each compared with its own exact result.
    """
    results, moves = [], op.endswith("project")
    here = run(op, case, cast(tensors, F64), "reference", **options) if moves else None
    for seed in range(RUNS):
        generator = torch.Generator().manual_seed(seed)
        orders = {
            axis: torch.randperm(n, generator=generator) if seed else torch.arange(n) for axis, n in case.widths.items()
        }
        inputs = tensors
        if moves and seed:
            inputs = {k: x if x is None else moved(x, seed) for k, x in tensors.items()}
        shuffled = {k: x if x is None else reorder(k, x, orders) for k, x in inputs.items()}
        outputs = run(op, case, shuffled, "reference", directions=orders["D"], seed=seed, **options)
        back = {axis: order.argsort() for axis, order in orders.items()}
        values = "weights" if op == "prompt_relevance" else "values"
        names = {k: values if k == "output" else k.removeprefix("grad of ") for k in outputs}
        outputs = {k: reorder(names[k], x, back) for k, x in outputs.items()}
        if inputs is not tensors:
            there = run(op, case, cast(inputs, F64), "reference", **options)
            # In float64, for the difference is what counts; the first run has the dtypes.
            outputs = {k: here[k] + (x.double() - there[k]) for k, x in outputs.items()}
        results.append(outputs)
    return results


def moved(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x with each element moved by at most an eps of its dtype, relatively."""
    noise = torch.rand(x.shape, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (x.double() * (1 + torch.finfo(x.dtype).eps * noise)).to(x.dtype)


def reorder(name: str, x: torch.Tensor, orders: dict[str, torch.Tensor]) -> torch.Tensor:
    """x with its channels in these orders."""
    axes = AXES.get(name, "")
    for n, axis in enumerate(axes, start=x.dim() - len(axes)):
        x = x.index_select(n, orders[axis])
    return x


def cast(tensors: dict, dtype: torch.dtype) -> dict:
    return {name: x if x is None else x.to(dtype) for name, x in tensors.items()}


def layout_preserving_copy(x, device):
    return x if device == "cpu" else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)
