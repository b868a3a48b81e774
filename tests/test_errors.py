"""Every wrong input of the ops: what it raises, word for word."""

import re

import numpy
import pytest
import torch

from ppllava_kernels import PromptGuidedPool3d, WeightedPool3d, prompt_guided_pool3d, prompt_relevance, weighted_pool3d

B, T, H, W, C, D = 2, 4, 6, 6, 16, 8
WINDOW = dict(kernel_size=(2, 3, 3))
V = torch.randn(B, T, H, W, D)


def good():
    return dict(
        values=torch.randn(B, T, H, W, D),
        image_embeds=torch.randn(B, T, H, W, C),
        text_embeds=torch.randn(B, C),
        **WINDOW,
    )


def ragged(cu_frames):
    inputs = dict(values=torch.randn(8, H, W, D), image_embeds=torch.randn(8, H, W, C), text_embeds=torch.randn(B, C))
    return inputs | WINDOW | dict(cu_frames=cu_frames)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


class Meta:
    """Another device that exists everywhere."""

    values = torch.empty(B, T, H, W, D, device="meta")
    cu_frames = torch.empty(3, dtype=torch.int32, device="meta")


CHANGES = {
    "values_rank": (
        dict(values=torch.randn(T, H, W, D)),
        ValueError,
        "values must be [B, T, H, W, D], got shape [4, 6, 6, 8]; add a batch axis, or pass cu_frames",
    ),
    "image_embeds_rank": (
        dict(image_embeds=torch.randn(B, T, H * W, C)),
        ValueError,
        "image_embeds must be [B, T, H, W, C], got shape [2, 4, 36, 16]; add a batch axis, or pass cu_frames",
    ),
    "text_embeds_rank": (
        dict(text_embeds=torch.randn(C)),
        ValueError,
        "text_embeds must be [B, C], got shape [16]; pass one pooled text embedding per video",
    ),
    "batch": (
        dict(text_embeds=torch.randn(1, C)),
        ValueError,
        "text_embeds must be [B, C] with B = 2 videos, got B = 1; use text_embeds.expand(B, -1) to share one prompt",
    ),
    "grid": (
        dict(image_embeds=torch.randn(B, T, H, W - 1, C)),
        ValueError,
        "image_embeds must be [B, T, H, W, C] with [B, T, H, W] = [2, 4, 6, 6] to match values, got [2, 4, 6, 5]; "
        "both must describe the same patches",
    ),
    "channels": (
        dict(text_embeds=torch.randn(B, C + 1)),
        ValueError,
        "text_embeds must have the 16 channels of image_embeds, got 17; "
        "use image and text embeddings of one CLIP model",
    ),
    "no_channels": (
        dict(values=torch.randn(B, T, H, W, 0)),
        ValueError,
        "values must be [B, T, H, W, D] of which only B may be 0, got shape [2, 4, 6, 6, 0]; "
        "pass at least one channel D",
    ),
    "no_embeds": (
        dict(image_embeds=torch.randn(B, T, H, W, 0)),
        ValueError,
        "image_embeds must be [B, T, H, W, C] of which only B may be 0, got shape [2, 4, 6, 6, 0]; "
        "pass at least one channel C",
    ),
    "neither_window": (
        dict(kernel_size=None),
        ValueError,
        "exactly one of kernel_size and output_size must be given, got neither; pass one of them",
    ),
    "both_windows": (
        dict(output_size=2),
        ValueError,
        "exactly one of kernel_size and output_size must be given, got kernel_size=(2, 3, 3) and output_size=2; "
        "pass one of them",
    ),
    "stride_with_output_size": (
        dict(kernel_size=None, output_size=2, stride=1),
        ValueError,
        "stride must be None where output_size sets the windows, got stride=1; "
        "drop it or pass kernel_size instead of output_size",
    ),
    "kernel_too_large": (
        dict(kernel_size=(5, 3, 3)),
        ValueError,
        "kernel_size must fit into the clip, got kernel_size (5, 3, 3) for (T, H, W) = (4, 6, 6); "
        "use a smaller kernel_size, or output_size, which fits any clip",
    ),
    "kernel_zero": (
        dict(kernel_size=(2, 0, 3)),
        ValueError,
        "kernel_size must be three positive ints for (T, H, W), got (2, 0, 3); pass for example (2, 3, 3)",
    ),
    "kernel_two_axes": (
        dict(kernel_size=(2, 3)),
        ValueError,
        "kernel_size must be three positive ints for (T, H, W), got (2, 3); pass for example (2, 3, 3)",
    ),
    "kernel_float": (
        dict(kernel_size=2.0),
        TypeError,
        "kernel_size must be an int or three ints for (T, H, W), got 2.0; pass for example (2, 3, 3)",
    ),
    "stride_negative": (
        dict(stride=-1),
        ValueError,
        "stride must be three positive ints for (T, H, W), got -1; pass for example (2, 3, 3)",
    ),
    "output_size_zero": (
        dict(kernel_size=None, output_size=(0, 1, 1)),
        ValueError,
        "output_size must be three positive ints for (T, H, W), got (0, 1, 1); pass for example (2, 3, 3)",
    ),
    "temperature_zero": (
        dict(temperature=0.0),
        ValueError,
        "temperature must be positive and finite in float32, got 0.0; the original model uses 0.01",
    ),
    "temperature_tiny": (
        dict(temperature=1e-46),
        ValueError,
        "temperature must be positive and finite in float32, got 1e-46; the original model uses 0.01",
    ),
    "temperature_bool": (
        dict(temperature=True),
        TypeError,
        "temperature must be a float, got bool; pass a number such as 0.01",
    ),
    "temperature_tensor": (
        dict(temperature=torch.tensor(0.1)),
        TypeError,
        "temperature must be a float, got Tensor; pass a number such as 0.01",
    ),
    "logit_scale_nan": (
        dict(logit_scale=float("nan")),
        ValueError,
        "logit_scale must be finite, got nan; pass exp(logit_scale)",
    ),
    "logit_scale_text": (
        dict(logit_scale="100"),
        TypeError,
        "logit_scale must be a float or a tensor, got str; pass exp(logit_scale)",
    ),
    "logit_scale_vector": (
        dict(logit_scale=torch.ones(2)),
        ValueError,
        "logit_scale must be one floating point number, got torch.float32 of shape [2]; "
        "pass exp(logit_scale) of the CLIP model",
    ),
    "logit_scale_device": (
        dict(logit_scale=torch.ones((), device="meta")),
        ValueError,
        "logit_scale must be on the device of image_embeds, cpu, got meta; "
        "use logit_scale.to(image_embeds.device), or a float",
    ),
    "channel_axis": (
        dict(values=torch.randn(B, D, T, H, W).movedim(1, -1)),
        ValueError,
        "values must have a contiguous channel axis (stride 1), got strides (1152, 36, 6, 1, 144); "
        "use values.contiguous()",
    ),
    "text_channel_axis": (
        dict(text_embeds=torch.randn(C, B).T),
        ValueError,
        "text_embeds must have a contiguous channel axis (stride 1), got strides (1, 2); use text_embeds.contiguous()",
    ),
    "integers": (
        dict(values=torch.ones(B, T, H, W, D, dtype=torch.int64)),
        TypeError,
        "values must be float32, float16, bfloat16 or float64, got torch.int64; convert it, e.g. values.float()",
    ),
    "not_a_tensor": (
        dict(text_embeds=[1.0]),
        TypeError,
        "text_embeds must be a tensor, got list; wrap it with torch.as_tensor",
    ),
    "missing": (
        dict(image_embeds=None),
        TypeError,
        "image_embeds must be a tensor, got NoneType; wrap it with torch.as_tensor",
    ),
    "sparse": (
        dict(values=torch.zeros(B, T, H, W, D).to_sparse()),
        TypeError,
        "values must be a dense tensor, got torch.sparse_coo; use values.to_dense()",
    ),
    "output_size_huge": (
        dict(kernel_size=None, output_size=2**70),
        ValueError,
        f"output_size must be three positive ints for (T, H, W), got {2**70}; pass for example (2, 3, 3)",
    ),
    "some_float64": (
        dict(values=torch.randn(B, T, H, W, D, dtype=torch.float64)),
        TypeError,
        "image_embeds must be float64 exactly where values is, got torch.float32 beside torch.float64; "
        "use float64 for all tensors or for none",
    ),
    "devices": (
        dict(values=Meta.values),
        ValueError,
        "image_embeds must be on the device of values, meta, got cpu; use image_embeds.to(values.device)",
    ),
    "backend_list": (
        dict(backend=["cpp"]),
        ValueError,
        "backend must be None or one of cuda, cpp, triton, reference, got ['cpp']; None takes the best",
    ),
    "unknown_backend": (
        dict(backend="cudnn"),
        ValueError,
        "backend must be None or one of cuda, cpp, triton, reference, got 'cudnn'; None takes the best",
    ),
}


ARGUMENTS = {
    prompt_relevance: {"image_embeds", "text_embeds", "logit_scale", "backend"},
    weighted_pool3d: {"values", "weights", "kernel_size", "stride", "output_size", "temperature", "backend"},
}
ARGUMENTS[prompt_guided_pool3d] = (ARGUMENTS[prompt_relevance] | ARGUMENTS[weighted_pool3d]) - {"weights"}


def concerns(op, change):
    """Whether an op has the arguments that are changed and those that the message compares them with."""
    changed, _, message = CHANGES[change]
    named = {name for name in ("values", "image_embeds", "text_embeds") if name in message}
    return set(changed) | named <= ARGUMENTS[op]


DENSE = [
    pytest.param(op, change, id=f"{op.__name__}-{change}")
    for op in ARGUMENTS
    for change in CHANGES
    if concerns(op, change)
]


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton", "cuda", None])
@pytest.mark.parametrize(("op", "change"), DENSE)
def test_dense(op, change, backend):
    changed, error, message = CHANGES[change]
    arguments = good() | dict(weights=torch.rand(B, T, H, W), backend=backend) | changed
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        op(**{name: x for name, x in arguments.items() if name in ARGUMENTS[op]})


def test_every_change_concerns_an_op():
    assert {param.values[1] for param in DENSE} == set(CHANGES)
    assert {param.values[0] for param in DENSE} == set(ARGUMENTS)


@pytest.mark.parametrize("module", [WeightedPool3d, PromptGuidedPool3d])
@pytest.mark.parametrize(
    "change", [name for name in CHANGES if "window" in name or "kernel" in name or "backend" in name]
)
def test_modules_complain_when_they_are_made(module, change):
    changed, error, message = CHANGES[change]
    if change == "kernel_too_large":  # only a clip can tell
        module(**changed)
        return
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        module(**(WINDOW | changed))


def test_numpy_integers_are_integers():
    size = tuple(numpy.array([2, 3, 3]))
    assert torch.equal(weighted_pool3d(V, None, kernel_size=size), weighted_pool3d(V, None, kernel_size=(2, 3, 3)))


CU_FRAMES = {
    "int64": (
        torch.tensor([0, 3, 8]),
        TypeError,
        "cu_frames must be an int32 tensor, got torch.int64; use torch.tensor(..., dtype=torch.int32)",
    ),
    "list": (
        [0, 3, 8],
        TypeError,
        "cu_frames must be an int32 tensor, got list; use torch.tensor(..., dtype=torch.int32)",
    ),
    "rank": (
        int32(0, 3, 8)[None],
        ValueError,
        "cu_frames must be [B+1], got shape [1, 3]; pass 0 and the cumulative sum of the frames of each video",
    ),
    "nothing": (
        int32(),
        ValueError,
        "cu_frames must be [B+1], got shape [0]; pass 0 and the cumulative sum of the frames of each video",
    ),
    "start": (
        int32(1, 3, 8),
        ValueError,
        "cu_frames must start at 0, got 1; prepend the 0 of the first video",
    ),
    "decreasing": (
        int32(0, 9, 8),
        ValueError,
        "cu_frames must not decrease, got 9 then 8 for video 1; pass cumulative sums",
    ),
    "negative": (
        int32(0, -2, 8),
        ValueError,
        "cu_frames must not decrease, got 0 then -2 for video 0; pass cumulative sums",
    ),
    "empty_video": (
        int32(0, 8, 8),
        ValueError,
        "cu_frames must give every video a frame, got none for video 1; leave that video out",
    ),
    "end_early": (
        int32(0, 3, 7),
        ValueError,
        "cu_frames must end at F = 8, the packed frames, got 7; check the last length",
    ),
    "end_late": (
        int32(0, 3, 9),
        ValueError,
        "cu_frames must end at F = 8, the packed frames, got 9; check the last length",
    ),
    "device": (
        Meta.cu_frames,
        ValueError,
        "cu_frames must be on the CPU or on the device of values, cpu, got meta; "
        "keep it on the CPU, which also saves a synchronisation",
    ),
    "batch": (
        int32(0, 3, 5, 8),
        ValueError,
        "text_embeds must be [B, C] with B = 3 videos, got B = 2; one row for each video",
    ),
    "short_video": (
        int32(0, 1, 8),
        ValueError,
        "kernel_size must fit into video 0 of cu_frames, got kernel_size (2, 3, 3) for (T, H, W) = (1, 6, 6); "
        "use a smaller kernel_size, or output_size, which fits any clip",
    ),
}


# prompt_relevance has no windows to be too short for, weighted_pool3d no prompts to miscount.
RAGGED = [
    pytest.param(op, case, id=f"{op.__name__}-{case}")
    for op in ARGUMENTS
    for case in CU_FRAMES
    if (op, case) not in ((prompt_relevance, "short_video"), (weighted_pool3d, "batch"))
]


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize(("op", "case"), RAGGED)
def test_ragged(op, case, backend):
    cu_frames, error, message = CU_FRAMES[case]
    if op is prompt_relevance:
        message = message.replace("device of values", "device of image_embeds")
    arguments = ragged(cu_frames) | dict(weights=torch.rand(8, H, W), backend=backend)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        op(cu_frames=cu_frames, **{name: x for name, x in arguments.items() if name in ARGUMENTS[op]})


def test_ragged_rank():
    inputs = ragged(int32(0, 3, 8)) | dict(values=torch.randn(1, 8, H, W, D))
    message = "values must be [F, H, W, D], got shape [1, 8, 6, 6, 8]; pack the frames of all videos"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prompt_guided_pool3d(**inputs)


def test_the_other_ops_check_as_well():
    message = (
        "weights must be [B, T, H, W] with [B, T, H, W] = [2, 4, 6, 6] to match values, got [2, 144]; "
        "both must describe the same patches"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        weighted_pool3d(torch.randn(B, T, H, W, D), torch.rand(B, T * H * W), **WINDOW)
    with pytest.raises(TypeError, match=r"^weights must be float32"):
        weighted_pool3d(torch.randn(B, T, H, W, D), torch.ones(B, T, H, W, dtype=torch.bool), **WINDOW)
    with pytest.raises(ValueError, match=r"^text_embeds must have the 16 channels"):
        prompt_relevance(torch.randn(B, T, H, W, C), torch.randn(B, 3))
    with pytest.raises(ValueError, match=r"^temperature must be positive and finite in float32, got -1; the original"):
        PromptGuidedPool3d(2, temperature=-1)
    with pytest.raises(ValueError, match=r"^logit_scale must be one floating point number, got torch.float32 of shape"):
        PromptGuidedPool3d(2, logit_scale=torch.ones(3))
