"""Calls of torch.ops and of programs of torch.export: what no check of Python has seen is refused, in one sentence.

Without these checks they read and wrote beyond their tensors, or gave numbers of something else.
"""

import re

import pytest
import torch

import ppllava_kernels
from ppllava_kernels.backends import cpp

B, T, H, W, C, D, V = 1, 4, 6, 6, 5, 8, 12
F = B * T
KERNEL, ADAPTIVE = ([2, 3, 3], [2, 3, 3], []), ([], [], [2, 2, 2])
OPS = torch.ops.ppllava_kernels


def r(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def relevance(**changed):
    x = dict(image_embeds=r(B, T, H, W, C), text_embeds=r(B, C), scale_tensor=None, scale=1.0, cu_frames=None)
    return "prompt_relevance", x | changed


def relevance_backward(**changed):
    x = dict(grad=r(B, T, H, W), relevance=torch.rand(B, T, H, W)) | relevance()[1]
    return "prompt_relevance_backward", x | changed


def window_of(kernel_size=(2, 3, 3), stride=(2, 3, 3), output_size=(), temperature=0.01):
    return dict(kernel_size=kernel_size, stride=stride, output_size=output_size, temperature=temperature)


def pool(**changed):
    x = dict(values=r(B, T, H, W, D), weights=torch.rand(B, T, H, W)) | window_of() | dict(cu_frames=None)
    return "weighted_pool3d", x | changed


def pool_backward(**changed):
    x = dict(grad=r(B, 2, 2, 2, D)) | pool()[1] | dict(need_values=True, need_weights=True)
    return "weighted_pool3d_backward", x | changed


def guided(**changed):
    x = dict(values=r(B, T, H, W, D)) | relevance()[1] | window_of()
    return "prompt_guided_pool3d", x | changed


def guide(**changed):
    x = dict(features=r(B, T, H, W, V), text_embeds=r(B, C), scale_tensor=None, scale=1.0, norm_weight=r(V))
    x |= dict(norm_bias=r(V), norm_eps=1e-5, guide_weight=r(C, V), cu_frames=None)
    return "guide_relevance", x | changed


def guide_backward(**changed):
    scores = dict(grad=r(B, T, H, W), relevance=torch.rand(B, T, H, W), cosines=torch.rand(B, T, H, W))
    need = dict(need_features=True, need_text=True, need_norm=True, need_guide=True)
    return "guide_relevance_backward", scores | guide()[1] | need | changed


def hidden(**changed):
    x = dict(features=r(B, T, H, W, V), weights=torch.rand(B, T, H, W), linear_1_weight=r(D, V), linear_1_bias=r(D))
    return "hidden_pool3d", x | window_of() | dict(cu_frames=None) | changed


def hidden_backward(**changed):
    need = dict(need_features=True, need_weights=True, need_weight=True, need_bias=True)
    return "hidden_pool3d_backward", dict(grad=r(B, 2, 2, 2, D)) | hidden()[1] | need | changed


GOOD = (relevance, relevance_backward, pool, pool_backward, guided, guide, guide_backward, hidden, hidden_backward)
CLIPS = {
    relevance: "image_embeds",
    relevance_backward: "image_embeds",
    pool: "values",
    pool_backward: "values",
    guided: "values",
    guide: "features",
    guide_backward: "features",
    hidden: "features",
    hidden_backward: "features",
}
WINDOWS = (pool, pool_backward, guided, hidden, hidden_backward)
TEXTS = (relevance, relevance_backward, guided, guide, guide_backward)

NO_CU_FRAMES = r"must be \[B, T, H, W, channels\] without cu_frames, got shape"
CU_FRAMES = r"must be \[F, H, W, channels\] with cu_frames, got shape"
EITHER = "either kernel_size and stride or output_size must be three positive ints"
CHANNELS = r"must have a contiguous channel axis \(stride 1\), got strides"
MATCH = "to match the other tensors of this call"
BESIDE = "beside the other tensors of this call"


def packed(make, cu_frames):
    """All that goes with patches or windows as of one clip with these cu_frames."""
    tensors = {k: x for k, x in make()[1].items() if isinstance(x, torch.Tensor) and x.dim() > 3}
    return {k: x[0] for k, x in tensors.items()} | dict(cu_frames=cu_frames)


def recipes():
    """(name, what makes the call, what is wrong, the sentence)."""
    for make in GOOD:
        clips = CLIPS[make]
        good = make()[1][clips]
        yield "4_axes_alone", make, packed(make, None), NO_CU_FRAMES
        yield "5_axes_packed", make, dict(cu_frames=int32(0, 1)), CU_FRAMES
        yield "3_axes", make, {clips: good[0, 0]}, NO_CU_FRAMES
        strided = {clips: good.transpose(3, 4).contiguous().transpose(3, 4)}
        yield "strided_channels", make, strided, CHANNELS
        yield "expanded_channels", make, {clips: good[..., :1].expand_as(good)}, CHANNELS
        yield "zeros_without_memory", make, {clips: torch._efficientzerotensor(good.shape)}, CHANNELS
        yield "integers", make, {clips: good.long()}, "must be float32, float16, bfloat16 or float64, got"
        yield "no_patches", make, {clips: good[:, :, :, :0]}, "(must|may be empty)"
        yield "cu_frames_of_int64", make, packed(make, torch.tensor([0, T])), r"cu_frames must be int32"
        yield "cu_frames_of_2_axes", make, packed(make, int32(0, T)[None]), r"cu_frames must be int32"
        yield "cu_frames_without_end", make, packed(make, int32(0, T + 1)), "cu_frames must end at F = 4"
        yield "cu_frames_backwards", make, packed(make, int32(5, T)), "cu_frames must start at 0"
    for make in WINDOWS:
        yield "both_windows", make, window_of(output_size=(9, 9, 9)), EITHER
        yield "no_window", make, window_of((), ()), EITHER
        yield "kernel_zero", make, window_of((0, 0, 0), (1, 1, 1)), EITHER
        yield "kernel_negative", make, window_of((2, -3, 3)), EITHER
        yield "kernel_of_two", make, window_of((2, 3)), EITHER
        yield "stride_zero", make, window_of(stride=(2, 0, 3)), EITHER
        yield "stride_huge", make, window_of(stride=(2, 2**32, 3)), EITHER
        yield "outputs_zero", make, window_of((), (), (0, 1, 1)), EITHER
        yield "kernel_too_large", make, window_of((5, 3, 3)), "kernel_size must fit into"
        for temperature in (0.0, -1.0, float("nan"), 1e-46, float("inf")):
            wrong = window_of(temperature=temperature)
            yield f"temperature_{temperature}", make, wrong, "temperature must be positive and finite in float32"
    for make in TEXTS:
        yield "a_text_too_many", make, dict(text_embeds=r(B + 1, C)), f"text_embeds must be .* {MATCH}"
        yield "text_of_other_channels", make, dict(text_embeds=r(B, C + 1)), f"text_embeds must be .* {MATCH}"
    yield "embeds_of_4_axes", guided, dict(image_embeds=r(T, H, W, C)), "must"
    yield "embeds_of_other_patches", guided, dict(image_embeds=r(B, T, H, W + 1, C)), "must"
    for make in (pool, pool_backward, hidden, hidden_backward):
        yield "weights_of_other_patches", make, dict(weights=torch.rand(B, T, H, W + 1)), f"weights must be .* {MATCH}"
    for make in (pool_backward, hidden_backward):
        yield "a_row_too_few", make, dict(grad=r(1, 1, 1, 1, D)), "grad must"
        yield "a_channel_too_few", make, dict(grad=r(B, 2, 2, 2, D - 1)), "grad must"
        yield "grad_in_float64", make, dict(grad=r(B, 2, 2, 2, D).double()), f"grad must be .* {BESIDE}"
        yield "gradient_of_no_weights", make, dict(weights=None), "need_weights must be False where weights are None"
    yield (
        "gradient_of_no_bias",
        hidden_backward,
        dict(linear_1_bias=None),
        "need_bias must be False where bias are None",
    )
    for make in (relevance_backward, guide_backward):
        for name in ("grad", "relevance"):
            yield f"{name}_of_other_patches", make, {name: r(B, T, H, W - 1)}, f"{name} must be .* {MATCH}"
            yield f"{name}_in_float64", make, {name: r(B, T, H, W).double()}, f"{name} must be .* {BESIDE}"
        yield "relevance_strided", make, dict(relevance=r(B, T, W, H).transpose(2, 3)), "relevance must be contiguous"
    for make in (guide, guide_backward):
        yield "guide_in_float64", make, dict(guide_weight=r(C, V).double()), f"guide_weight must be .* {BESIDE}"
        yield "guide_of_other_channels", make, dict(guide_weight=r(C, V + 1)), f"guide_weight must be .* {MATCH}"
        yield "norm_of_other_channels", make, dict(norm_weight=r(V + 1)), f"norm_weight must be .* {MATCH}"
    for make in (hidden, hidden_backward):
        yield "layer_of_other_channels", make, dict(linear_1_weight=r(D, V + 1)), f"linear_1_weight must be .* {MATCH}"
        yield "bias_of_other_channels", make, dict(linear_1_bias=r(D + 1)), f"linear_1_bias must be .* {MATCH}"


def call(name, arguments, backend):
    """The op, which takes its arguments by name."""
    return getattr(OPS, name)(**arguments, backend=backend)


@pytest.mark.parametrize("make", GOOD, ids=lambda make: make.__name__)
def test_good_calls_run(make, place):
    """So that each recipe fails for the one reason that it names."""
    name, arguments = make()
    arguments = {k: x.to(place[1]) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    call(name, arguments, place[0])


@pytest.mark.parametrize(
    ("make", "changed", "message"),
    [pytest.param(*rest, id=f"{rest[0].__name__}-{name}") for name, *rest in recipes()],
)
def test_refused(make, changed, message, place):
    backend, device = place
    name, arguments = make(**changed)
    arguments = {
        k: x.to(device) if isinstance(x, torch.Tensor) and device != "cpu" else x for k, x in arguments.items()
    }
    with pytest.raises(ValueError, match=message) as raised:
        call(name, arguments, backend)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", ["reference", "cudnn"])
def test_a_backend_without_registered_ops(backend):
    message = f"backend of a registered op must be one of cuda, cpp, triton, got '{backend}'; the reference is plain"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(*pool(), backend)


def test_a_backend_of_another_device(monkeypatch):
    with pytest.raises(ValueError, match=r"cuda runs on CUDA tensors, got one on cpu"):
        call(*pool(), "cuda")


def test_a_storage_that_was_freed(place):
    """As sharded training frees those of parameters."""
    backend, device = place
    values = r(B, T, H, W, D).to(device)
    values.untyped_storage().resize_(0)
    if backend == "triton":
        pytest.skip("Triton's launcher takes any pointer, and none is read; cpp and cuda run this")
    name, arguments = pool(values=values, weights=torch.rand(B, T, H, W, device=device))
    message = r"^values must have memory for its shape \[1, 4, 6, 6, 8\], got a storage of 0 bytes"
    with pytest.raises(ValueError, match=message):
        call(name, arguments, backend)


# What the compiled kernels are called with, whatever made it.
SLOTS = 8 * 18
WINDOW = ((2, 3, 3), (2, 3, 3), ())
TILE = dict(sums=torch.zeros(8, D), hidden=r(36, D), bias=r(D), shares=torch.rand(SLOTS), first=0, channel=0)
TILE |= dict(features=r(B, T, H, W, V), window=WINDOW, counts=(T,))
GRADS = {name: TILE[name] for name in ("hidden", "bias", "shares")} | dict(dots=torch.zeros(SLOTS), grad=r(8, D))
GRADS |= {name: TILE[name] for name in ("first", "channel", "features", "window", "counts")}
SHARES = dict(shares=torch.empty(SLOTS), weights=torch.rand(B, T, H, W), features=TILE["features"], temperature=0.1)
SHARES |= dict(window=WINDOW, counts=(T,))
POOLED = dict(pooled=torch.empty(B, 2, 2, 2, D), values=r(B, T, H, W, D), weights=None, temperature=0.1)
POOLED |= dict(window=WINDOW, counts=(T,))
SCORES = dict(cosines=torch.empty(9), embeds=r(9, C), text=r(C))
COMPILED = {
    "too_many_frames": ("weighted_pool3d", POOLED | dict(counts=(T + 1,)), "the frames of each clip must add up"),
    "too_few_clips": ("weighted_pool3d", POOLED | dict(counts=()), "the frames of each clip must add up"),
    "a_clip_of_no_frame": ("weighted_pool3d", POOLED | dict(counts=(0,)), "the frames of each clip must add up"),
    "a_negative_clip": (
        "weighted_pool3d",
        POOLED | dict(values=r(F, H, W, D), counts=(-1, F + 1)),
        "the frames of each clip must add up",
    ),
    "a_small_output": (
        "weighted_pool3d",
        POOLED | dict(pooled=torch.empty(1, 1, 2, 2, D)),
        "pooled must have 8 channels for each of 8 windows, got shape [1, 1, 2, 2, 8]",
    ),
    "an_output_of_half": (
        "weighted_pool3d",
        POOLED | dict(pooled=torch.empty(B, 2, 2, 2, D).half()),
        "pooled must be float32",
    ),
    "low_weights": (
        "weighted_pool3d",
        POOLED | dict(weights=torch.rand(B, T, H, W).half()),
        "weights must be float32",
    ),
    "few_shares": ("window_shares", SHARES | dict(shares=torch.empty(SLOTS - 1)), "shares must be [144]"),
    "kernel_too_large": ("window_shares", SHARES | dict(window=((2, 7, 3), (1, 1, 1), ())), "kernel_size must fit"),
    "a_tile_beyond_the_clip": ("pool_hidden", TILE | dict(first=140), "hidden must hold patches of one clip, got 36"),
    "a_tile_before_the_clip": ("pool_hidden", TILE | dict(first=-1), "hidden must hold patches of one clip"),
    "a_tile_of_other_channels": ("pool_hidden", TILE | dict(channel=1), "hidden must hold some of 8 channels, got 8"),
    "a_tile_of_float64": ("pool_hidden", TILE | dict(hidden=r(36, D).double()), "hidden must be float64 exactly"),
    "low_sums": ("pool_hidden", TILE | dict(sums=torch.zeros(8, D).half()), "sums must be float32"),
    "few_sums": ("pool_hidden", TILE | dict(sums=torch.zeros(7, D)), "sums must have 8 channels for each of 8 windows"),
    "a_long_bias": ("pool_hidden", TILE | dict(bias=r(D + 1)), "bias must be [8]"),
    "few_dots": ("pool_hidden_backward", GRADS | dict(dots=torch.zeros(SLOTS - 1)), "dots must be [144]"),
    "a_gradient_of_half": ("pool_hidden_backward", GRADS | dict(grad=r(8, D).half()), "grad must be float32"),
    "few_cosines": ("score_rows", SCORES | dict(cosines=torch.empty(8)), "cosines must be [9]"),
    "a_long_text": ("score_rows", SCORES | dict(text=r(C + 1)), "text must be [5]"),
    "embeds_of_half": ("score_rows", SCORES | dict(embeds=r(9, C).half(), text=r(C).half()), "text must be float32"),
    "text_of_float64": ("score_rows", SCORES | dict(text=r(C).double()), "text must be float32"),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_kernels_check_for_themselves(case):
    name, arguments, message = COMPILED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        getattr(cpp._C, name)(*arguments.values())


@pytest.mark.parametrize(("name", "arguments"), [("weighted_pool3d", POOLED), ("window_shares", SHARES)])
def test_compiled_kernels_take_what_fits(name, arguments):
    getattr(cpp._C, name)(*arguments.values())


class Pool(torch.nn.Module):
    def forward(self, values, weights):
        return ppllava_kernels.weighted_pool3d(values, weights, kernel_size=(2, 3, 3), backend="cpp")


class Project(torch.nn.Module):
    def forward(self, features, text, guide, layer):
        norm = dict(norm_weight=None, norm_bias=None, norm_eps=1e-5, guide_weight=guide)
        layers = dict(linear_1_weight=layer, linear_1_bias=None, linear_2_weight=layer[:, :D], linear_2_bias=None)
        return ppllava_kernels.prompt_guided_project(
            features, text, **norm, **layers, kernel_size=(2, 3, 3), backend="cpp"
        )


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("model", [Pool, Project])
def test_an_exported_program_is_called_with_other_strides(model, layout):
    """A program keeps no check of Python, and no guard on strides."""
    features = r(B, T, H, W, V)
    rest = (torch.rand(B, T, H, W),) if model is Pool else (r(B, C), r(C, V), r(D, V))
    program = torch.export.export(model(), (features, *rest)).module()
    torch.testing.assert_close(program(features, *rest), model()(features, *rest))
    other = features.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == "expanded":
        other = features[..., :1].expand_as(features)
    with pytest.raises(ValueError, match=CHANNELS):
        program(other, *rest)


def test_some_tensors_on_meta():
    """PyTorch takes such a call for one of meta tensors, and a fake gives memory without numbers."""
    name, arguments = relevance(text_embeds=r(B, C).to("meta"))
    message = r"^the tensors of a call must be on one device, got cpu and meta; move them$"
    with pytest.raises(ValueError, match=message):
        call(name, arguments, "cpp")
    name, arguments = relevance_backward(grad=torch.zeros(B, T, H, W, dtype=torch.bool, device="meta"))
    with pytest.raises(ValueError, match=message):
        call(name, arguments, "cpp")


@pytest.mark.parametrize("make", [relevance, relevance_backward])
def test_text_that_is_no_embedding(make, place):
    name, arguments = make(text_embeds=torch.ones(B, C, dtype=torch.bool, device=place[1]))
    arguments = {k: x.to(place[1]) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    with pytest.raises(ValueError, match=r"^text_embeds must be "):
        call(name, arguments, place[0])
