"""Every wrong input of the projector's ops that the other ops do not have: what it raises, word for word."""

import inspect
import re

import pytest
import torch
from cases import GUIDE, LAYERS, Case, make_projector_inputs

from ppllava_kernels import prompt_guided_project, weighted_project
from ppllava_kernels.backends import BACKENDS

B, T, H, W, C, D, V, E = 2, 4, 2, 3, 16, 8, 12, 24
WINDOW = dict(kernel_size=(2, 1, 3))
CU_FRAMES = torch.tensor([0, 3, 8], dtype=torch.int32)
X = torch.randn  # a tensor of a wrong shape


def good(cu_frames=None):
    """V, the width of the features, differs here from D, that of the tokens."""
    size = (B, T, H, W) if cu_frames is None else (8, H, W)
    tensors = make_projector_inputs(Case(size, (C, D), cu_frames=None if cu_frames is None else (0, 3, 8)))
    shapes = dict(features=(*size, V), guide_weight=(C, V), linear_1_weight=(E, V), linear_2_weight=(D, E))
    shapes |= dict(norm_weight=(V,), norm_bias=(V,), linear_1_bias=(E,), linear_2_bias=(D,))
    tensors |= {name: X(shape) for name, shape in shapes.items()}
    return tensors | WINDOW | dict(norm_eps=1e-5, cu_frames=cu_frames)


SHARED = {"features", *LAYERS, "kernel_size", "stride", "output_size", "temperature", "cu_frames", "backend"}
ARGUMENTS = {
    prompt_guided_project: SHARED | {"text_embeds", *GUIDE, "norm_eps", "logit_scale", "return_relevance"},
    weighted_project: SHARED | {"weights"},
}


def call(op, arguments):
    return op(**{name: x for name, x in arguments.items() if name in ARGUMENTS[op]})


NORM = " must be [V] with the V of features [2, 4, 2, 3, 12], got {}; normalise the features over their own channels"
LINEAR = "; pass the weight of nn.Linear, [out, in]"
TO_FEATURES = " with V = 12 to follow features [2, 4, 2, 3, 12], got "
TO_LINEAR_1 = "linear_2_weight must be [D, D'] with D' = 24 to follow linear_1_weight [24, 12], got "
BIAS = "; pass weight and bias of one linear layer"
TEXT = "text_embeds must be [B, C] with C = 16 to match guide_weight [16, 12], got "
CLIP = "; use text embeddings and projection of one CLIP model"
WEIGHTS = "weights must be [B, T, H, W] with [B, T, H, W] = [2, 4, 2, 3] to match features, got "
GRID = "; both must describe the same patches"

SHAPES = {
    "norm_weight": (X(V + 1), "norm_weight" + NORM.format([13])),
    "norm_bias": (X(V - 1), "norm_bias" + NORM.format([11])),
    "norm_weight_rank": (X(1, V), "norm_weight" + NORM.format([1, 12])),
    "norm_bias_number": (X(()), "norm_bias" + NORM.format([])),
    "guide_weight": (X(V, C), f"guide_weight must be [C, V]{TO_FEATURES}[12, 16]{LINEAR}"),
    "guide_weight_1d": (X(V), f"guide_weight must be [C, V]{TO_FEATURES}[12]{LINEAR}"),
    "guide_weight_3d": (X(1, C, V), f"guide_weight must be [C, V]{TO_FEATURES}[1, 16, 12]{LINEAR}"),
    "linear_1_weight": (X(V, E), f"linear_1_weight must be [D', V]{TO_FEATURES}[12, 24]{LINEAR}"),
    "guide_weight_empty": (X(0, V), f"guide_weight must not be empty, got [0, 12]{LINEAR}"),
    "linear_1_weight_empty": (X(0, V), f"linear_1_weight must not be empty, got [0, 12]{LINEAR}"),
    "linear_2_weight_empty": (X(0, E), f"linear_2_weight must not be empty, got [0, 24]{LINEAR}"),
    "linear_1_weight_1d": (X(V), f"linear_1_weight must be [D', V]{TO_FEATURES}[12]{LINEAR}"),
    "linear_1_weight_3d": (X(1, E, V), f"linear_1_weight must be [D', V]{TO_FEATURES}[1, 24, 12]{LINEAR}"),
    "linear_2_weight": (X(E, D), f"{TO_LINEAR_1}[24, 8]{LINEAR}"),
    "linear_2_weight_1d": (X(E), f"{TO_LINEAR_1}[24]{LINEAR}"),
    "linear_2_weight_3d": (X(1, D, E), f"{TO_LINEAR_1}[1, 8, 24]{LINEAR}"),
    "linear_1_bias": (
        X(V),
        f"linear_1_bias must be None or [24] to match linear_1_weight [24, 12], got [12]{BIAS}",
    ),
    "linear_1_bias_rank": (
        X(1, E),
        f"linear_1_bias must be None or [24] to match linear_1_weight [24, 12], got [1, 24]{BIAS}",
    ),
    "linear_2_bias": (X(E), f"linear_2_bias must be None or [8] to match linear_2_weight [8, 24], got [24]{BIAS}"),
    "text_embeds_rank": (X(C), f"{TEXT}[16]{CLIP}"),
    "text_embeds_channels": (X(B, V), f"{TEXT}[2, 12]{CLIP}"),
    "text_embeds_batch": (
        X(1, C),
        "text_embeds must be [B, C] with B = 2 videos, got B = 1; use text_embeds.expand(B, -1) to share one prompt",
    ),
    "text_embeds_strides": (
        X(C, B).t(),
        "text_embeds must have a contiguous channel axis (stride 1), got strides (1, 2); use text_embeds.contiguous()",
    ),
    "features_rank": (
        X(T, H, W, V),
        "features must be [B, T, H, W, V], got shape [4, 2, 3, 12]; add a batch axis, or pass cu_frames",
    ),
    "features_flat": (
        X(B, T, H * W, V),
        "features must be [B, T, H, W, V], got shape [2, 4, 6, 12]; add a batch axis, or pass cu_frames",
    ),
    "features_empty": (
        X(B, 0, H, W, V),
        "features must be [B, T, H, W, V] of which only B may be 0, got shape [2, 0, 2, 3, 12]; "
        "leave out videos without patches",
    ),
    "features_strides": (
        X(B, V, T, H, W).movedim(1, -1),
        "features must have a contiguous channel axis (stride 1), got strides (288, 6, 3, 1, 24); "
        "use features.contiguous()",
    ),
    "weights": (X(B, T, H * W), f"{WEIGHTS}[2, 4, 6]{GRID}"),
    "weights_channels": (X(B, T, H, W, 1), f"{WEIGHTS}[2, 4, 2, 3, 1]{GRID}"),
}


def argument(name):
    """The one that a change is named after."""
    return max((x for x in set().union(*ARGUMENTS.values()) if name.startswith(x)), key=len)


def parameters(changes):
    return [
        pytest.param(op, name, id=f"{op.__name__}-{name}")
        for op in ARGUMENTS
        for name in changes
        if argument(name) in ARGUMENTS[op]
    ]


def rejected(op, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(op, arguments)


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize(("op", "change"), parameters(SHAPES))
def test_shapes(op, change, backend):
    x, message = SHAPES[change]
    rejected(op, good() | {argument(change): x, "backend": backend}, ValueError, message)


RAGGED = {
    "features": (
        X(1, 8, H, W, V),
        "features must be [F, H, W, V], got shape [1, 8, 2, 3, 12]; pack the frames of all ",
    ),
    "text_embeds": (X(3, C), "text_embeds must be [B, C] with B = 2 videos, got B = 3; one row for each video"),
    "norm_bias": (X(V + 1), "norm_bias must be [V] with the V of features [8, 2, 3, 12], got [13]; normalise the "),
    "linear_1_weight": (X(V, E), "linear_1_weight must be [D', V] with V = 12 to follow features [8, 2, 3, 12], got "),
    "weights": (
        X(8, H * W),
        "weights must be [F, H, W] with [F, H, W] = [8, 2, 3] to match features, got [8, 6]; both ",
    ),
}


@pytest.mark.parametrize(("op", "change"), parameters(RAGGED))
def test_ragged(op, change):
    x, message = RAGGED[change]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(op, good(CU_FRAMES) | {change: x})


# Where clips are packed a clip, not the batch, must be as long as the kernel; the backends find that themselves.
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_clip_that_is_too_short(op, backend):
    message = (
        "kernel_size must fit into video 0 of cu_frames, got kernel_size (4, 1, 3) for (T, H, W) = (3, 2, 3); "
        "use a smaller kernel_size, or output_size, which fits any clip"
    )
    rejected(op, good(CU_FRAMES) | dict(kernel_size=(4, 1, 3), backend=backend), ValueError, message)


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_frames_that_do_not_add_up(op, backend):
    message = "cu_frames must end at F = 8, the packed frames, got 9; check the last length"
    cu_frames = torch.tensor([0, 3, 9], dtype=torch.int32)
    rejected(op, good(CU_FRAMES) | dict(cu_frames=cu_frames, backend=backend), ValueError, message)


TENSORS = ("text_embeds", *GUIDE, *LAYERS, "weights")
OPTIONAL = ("norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias", "weights")


@pytest.mark.parametrize(("op", "name"), parameters(("features", *TENSORS)))
def test_what_is_no_tensor(op, name):
    message = "{} must be a tensor, got {}; wrap it with torch.as_tensor"
    rejected(op, good() | {name: [1.0]}, TypeError, message.format(name, "list"))
    if name not in OPTIONAL:
        rejected(op, good() | {name: None}, TypeError, message.format(name, "NoneType"))


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", None])
@pytest.mark.parametrize(("op", "name"), parameters(OPTIONAL))
def test_what_may_be_none(op, name, backend):
    neutral = torch.ones(V) if name == "norm_weight" else torch.zeros(())
    arguments = good() | dict(temperature=1.0, backend=backend)
    shape = () if arguments[name] is None else arguments[name].shape
    expected = call(op, arguments | {name: neutral.expand(shape).contiguous()})
    torch.testing.assert_close(call(op, arguments | {name: None}), expected)


@pytest.mark.parametrize(("op", "name"), parameters((*GUIDE, *LAYERS)))
def test_weights_of_another_dtype(op, name):
    message = (
        f"{name} must have the dtype of features, torch.float32, got torch.bfloat16; convert one of them, or run under "
        "torch.autocast"
    )
    rejected(op, good() | {name: good()[name].bfloat16()}, TypeError, message)
    with torch.autocast("cpu", torch.bfloat16):  # as the message says
        assert call(op, good() | {name: good()[name].bfloat16()}).dtype == torch.bfloat16


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_nested_tensors(op, layout):
    features = torch.nested.nested_tensor([torch.randn(4, H, W, V), torch.randn(2, H, W, V)], layout=layout)
    message = "features must not be nested, got a nested tensor; pack all frames and pass cu_frames"
    rejected(op, good() | dict(features=features), TypeError, message)


@pytest.mark.parametrize(("op", "name"), parameters(TENSORS))
def test_float64_beside_float32(op, name):
    message = (
        f"{name} must be float64 exactly where features is, got torch.float64 beside torch.float32; "
        "use float64 for all tensors or for none"
    )
    rejected(op, good() | {name: good()[name].double()}, TypeError, message)


@pytest.mark.parametrize(("op", "name"), parameters(("features", *TENSORS)))
def test_integers(op, name):
    message = f"{name} must be float32, float16, bfloat16 or float64, got torch.int64; convert it, e.g. {name}.float()"
    rejected(op, good() | {name: good()[name].long()}, TypeError, message)


@pytest.mark.parametrize(("op", "name"), parameters(TENSORS))
def test_another_device(op, name):
    message = f"{name} must be on the device of features, cpu, got meta; use {name}.to(features.device)"
    rejected(op, good() | {name: good()[name].to("meta")}, ValueError, message)


def test_another_device_of_the_scale():
    message = (
        "logit_scale must be on the device of features, cpu, got meta; use logit_scale.to(features.device), or a float"
    )
    rejected(prompt_guided_project, good() | dict(logit_scale=torch.ones((), device="meta")), ValueError, message)


OPTIONS = {
    "kernel_size_large": (
        dict(kernel_size=(5, 1, 3)),
        ValueError,
        "kernel_size must fit into the clip, got kernel_size (5, 1, 3) for (T, H, W) = (4, 2, 3); "
        "use a smaller kernel_size, or output_size, which fits any clip",
    ),
    "output_size_too": (
        dict(output_size=2),
        ValueError,
        "exactly one of kernel_size and output_size must be given, got kernel_size=(2, 1, 3) and output_size=2; "
        "pass one of them",
    ),
    "kernel_size_none": (
        dict(kernel_size=None),
        ValueError,
        "exactly one of kernel_size and output_size must be given, got neither; pass one of them",
    ),
    "output_size_huge": (
        dict(kernel_size=None, output_size=(2**20, 2**11, 1)),
        ValueError,
        "output_size must give fewer than 2**31 tokens per video, got (1048576, 2048, 1); pass for example (16, 8, 8)",
    ),
    "stride_zero": (
        dict(stride=0),
        ValueError,
        "stride must be three positive ints for (T, H, W), got 0; pass for example (2, 3, 3)",
    ),
    "temperature_zero": (
        dict(temperature=0),
        ValueError,
        "temperature must be positive and finite in float32, got 0; the original model uses 0.01",
    ),
    "logit_scale_infinite": (
        dict(logit_scale=float("inf")),
        ValueError,
        "logit_scale must be finite, got inf; pass exp(logit_scale)",
    ),
    "norm_eps_negative": (
        dict(norm_eps=-1e-5),
        ValueError,
        "norm_eps must be finite and not negative, got -1e-05; CLIP has 1e-5",
    ),
    "norm_eps_nan": (
        dict(norm_eps=float("nan")),
        ValueError,
        "norm_eps must be finite and not negative, got nan; CLIP has 1e-5",
    ),
    "norm_eps_infinite": (
        dict(norm_eps=float("inf")),
        ValueError,
        "norm_eps must be finite and not negative, got inf; CLIP has 1e-5",
    ),
    "norm_eps_text": (
        dict(norm_eps="1e-5"),
        TypeError,
        "norm_eps must be a float, got str; pass that of the layer norm",
    ),
    "norm_eps_none": (
        dict(norm_eps=None),
        TypeError,
        "norm_eps must be a float, got NoneType; pass that of the layer norm",
    ),
    "norm_eps_bool": (
        dict(norm_eps=True),
        TypeError,
        "norm_eps must be a float, got bool; pass that of the layer norm",
    ),
    "backend_unknown": (
        dict(backend="cudnn"),
        ValueError,
        "backend must be None or one of cuda, cpp, triton, reference, got 'cudnn'; None takes the best",
    ),
    "backend_list": (
        dict(backend=["cpp"]),
        ValueError,
        "backend must be None or one of cuda, cpp, triton, reference, got ['cpp']; None takes the best",
    ),
    "backend_cuda": (
        dict(backend="cuda"),
        ValueError,
        "backend='cuda' cannot run: cuda runs on CUDA tensors, got one on cpu; use backend=None, or move it with "
        ".cuda()",
    ),
}


@pytest.mark.parametrize(("op", "change"), parameters(OPTIONS))
def test_options(op, change):
    changed, error, message = OPTIONS[change]
    rejected(op, good() | changed, error, message)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_float64_on_triton(op):
    message = (
        "backend='triton' cannot run: triton computes in float32 and got float64; "
        "use backend='reference', or float32 inputs"
    )
    arguments = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in good().items()}
    rejected(op, arguments | dict(backend="triton"), ValueError, message)


def test_every_argument_is_known():
    for op, names in ARGUMENTS.items():
        assert names == set(inspect.signature(op).parameters)
