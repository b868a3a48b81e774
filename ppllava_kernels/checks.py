"""Every check of the ops' user input, once: name, what was expected, what came, what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends
from .shapes import Window, check_fits

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
DENSE, RAGGED = "B, T, H, W", "F, H, W"


def check_tensors(cu_frames: Tensor | None, **given: Tensor) -> None:
    """dtype and device of every tensor, then `cu_frames`; the values of `cu_frames` are checked where it is read."""
    head = None
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}; wrap it with torch.as_tensor")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}; convert it, e.g. {name}.float()"
            )
        if x.is_nested:
            raise TypeError(f"{name} must not be nested, got a nested tensor; pack all frames and pass cu_frames")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {x.layout}; use {name}.to_dense()")
        if head is None:
            first, head = name, x
        elif x.device != head.device:
            raise ValueError(
                f"{name} must be on the device of {first}, {head.device}, got {x.device}; use {name}.to({first}.device)"
            )
        elif x.dtype != head.dtype and torch.float64 in (x.dtype, head.dtype):
            raise TypeError(
                f"{name} must be float64 exactly where {first} is, got {x.dtype} beside {head.dtype}; "
                "use float64 for all tensors or for none"
            )
    if cu_frames is None:
        return
    if not isinstance(cu_frames, Tensor) or cu_frames.dtype != torch.int32:
        got = cu_frames.dtype if isinstance(cu_frames, Tensor) else type(cu_frames).__name__
        raise TypeError(f"cu_frames must be an int32 tensor, got {got}; use torch.tensor(..., dtype=torch.int32)")
    if cu_frames.dim() != 1 or cu_frames.shape[0] == 0:
        raise ValueError(
            f"cu_frames must be [B+1], got shape {list(cu_frames.shape)}; "
            "pass 0 and the cumulative sum of the frames of each video"
        )
    if cu_frames.device != head.device and cu_frames.device.type != "cpu":
        raise ValueError(
            f"cu_frames must be on the CPU or on the device of {first}, {head.device}, got {cu_frames.device}; "
            "keep it on the CPU, which also saves a synchronisation"
        )


def check_channels_last(name: str, x: Tensor, cu_frames: Tensor | None, channel: str) -> None:
    """[B, T, H, W, D], or [F, H, W, D] with `cu_frames`; only B or F may be 0; the channel axis contiguous."""
    if x.dim() != (5 if cu_frames is None else 4):
        lead = DENSE if cu_frames is None else RAGGED
        hint = "pack the frames of all videos" if cu_frames is not None else "add a batch axis, or pass cu_frames"
        raise ValueError(f"{name} must be [{lead}, {channel}], got shape {list(x.shape)}; {hint}")
    if 0 in x.shape[1:]:
        lead = DENSE if cu_frames is None else RAGGED
        hint = "leave out videos without patches" if 0 in x.shape[1:-1] else f"pass at least one channel {channel}"
        raise ValueError(
            f"{name} must be [{lead}, {channel}] of which only {lead[0]} may be 0, got shape {list(x.shape)}; {hint}"
        )
    check_contiguous_channels(name, x)


def check_contiguous_channels(name: str, x: Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        raise ValueError(
            f"{name} must have a contiguous channel axis (stride 1), got strides {tuple(x.stride())}; "
            f"use {name}.contiguous()"
        )


def check_grid(
    name: str, grid: torch.Size, values: Tensor, cu_frames: Tensor | None, channel: str = "", match: str = "values"
) -> None:
    """`grid`, the shape of `name` without its channel axis, is that of `values`."""
    if grid != values.shape[:-1]:
        lead = DENSE if cu_frames is None else RAGGED
        raise ValueError(
            f"{name} must be [{lead}{channel}] with [{lead}] = {list(values.shape[:-1])} to match {match}, "
            f"got {list(grid)}; both must describe the same patches"
        )


def check_embeds(image_embeds: Tensor, text_embeds: Tensor, cu_frames: Tensor | None) -> None:
    check_channels_last("image_embeds", image_embeds, cu_frames, "C")
    image, text = image_embeds.shape, text_embeds.shape
    batch = image[0] if cu_frames is None else cu_frames.shape[0] - 1
    if len(text) != 2:
        raise ValueError(
            f"text_embeds must be [B, C], got shape {list(text)}; pass one pooled text embedding per video"
        )
    if text[1] != image[-1]:
        raise ValueError(
            f"text_embeds must have the {image[-1]} channels of image_embeds, got {text[1]}; "
            "use image and text embeddings of one CLIP model"
        )
    _check_batch(text[0], batch, cu_frames)
    check_contiguous_channels("text_embeds", text_embeds)


def _check_batch(got: int, batch: int, cu_frames: Tensor | None) -> None:
    if got != batch:
        hint = "use text_embeds.expand(B, -1) to share one prompt" if cu_frames is None else "one row for each video"
        raise ValueError(f"text_embeds must be [B, C] with B = {batch} videos, got B = {got}; {hint}")


def check_window(values: Tensor, window: Window, cu_frames: Tensor | None) -> None:
    """Dense clips: the kernel fits. Ragged clips are checked frame count by frame count where `cu_frames` is read."""
    if cu_frames is None:
        check_fits("the clip", values.shape[1:4], window)


def check_temperature(temperature: float) -> float:
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool):
        raise TypeError(f"temperature must be a float, got {type(temperature).__name__}; pass a number such as 0.01")
    if not SMALLEST <= temperature <= LARGEST:
        raise ValueError(
            f"temperature must be positive and finite in float32, got {temperature}; the original model uses 0.01"
        )
    return float(temperature)


def check_logit_scale(logit_scale: float | Tensor) -> None:
    """A finite number, or a tensor of one floating point element."""
    if isinstance(logit_scale, (int, float)) and not isinstance(logit_scale, bool):
        if not abs(logit_scale) <= LARGEST:
            raise ValueError(f"logit_scale must be finite, got {logit_scale}; pass exp(logit_scale)")
    elif isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1 or logit_scale.dtype not in DTYPES:
            raise ValueError(
                f"logit_scale must be one floating point number, got {logit_scale.dtype} of shape "
                f"{list(logit_scale.shape)}; pass exp(logit_scale) of the CLIP model"
            )
    else:
        raise TypeError(
            f"logit_scale must be a float or a tensor, got {type(logit_scale).__name__}; pass exp(logit_scale)"
        )


def split_logit_scale(
    logit_scale: float | Tensor, image_embeds: Tensor, name: str = "image_embeds"
) -> tuple[float, Tensor | None]:
    """The scale as (float, tensor): their product counts, a missing tensor is 1; a tensor may ask for a gradient."""
    check_logit_scale(logit_scale)
    if not isinstance(logit_scale, Tensor):
        return float(logit_scale), None
    if logit_scale.device != image_embeds.device:
        raise ValueError(
            f"logit_scale must be on the device of {name}, {image_embeds.device}, got {logit_scale.device}; "
            f"use logit_scale.to({name}.device), or a float"
        )
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    return 1.0, logit_scale.reshape(()).to(dtype)


def check_projector(
    features: Tensor,
    norm_dtype: torch.dtype,
    linear_1_weight: Tensor,
    linear_1_bias: Tensor | None,
    linear_2_weight: Tensor,
    linear_2_bias: Tensor | None,
    **guide: Tensor | None,
) -> None:
    """Weights that chain from `features`, all in its dtype.

    norm_dtype: that of features before autocast, which leaves the norm alone.
    guide: norm_weight, norm_bias and guide_weight, if any.
    """
    width = features.shape[-1]
    for name in ("norm_weight", "norm_bias"):
        x = guide.get(name)
        if x is not None and x.shape != (width,):
            raise ValueError(
                f"{name} must be [V] with the V of features {list(features.shape)}, got {list(x.shape)}; "
                "normalise the features over their own channels"
            )
    _check_weight("guide_weight", guide.get("guide_weight"), "C, V", "features", features)
    _check_weight("linear_1_weight", linear_1_weight, "D', V", "features", features)
    _check_weight("linear_2_weight", linear_2_weight, "D, D'", "linear_1_weight", linear_1_weight.t())
    for bias, weight, x, y in (
        ("linear_1_bias", "linear_1_weight", linear_1_bias, linear_1_weight),
        ("linear_2_bias", "linear_2_weight", linear_2_bias, linear_2_weight),
    ):
        if x is not None and x.shape != y.shape[:1]:
            raise ValueError(
                f"{bias} must be None or [{y.shape[0]}] to match {weight} {list(y.shape)}, got {list(x.shape)}; "
                "pass weight and bias of one linear layer"
            )
    layers = dict(linear_1_weight=linear_1_weight, linear_1_bias=linear_1_bias)
    layers |= dict(linear_2_weight=linear_2_weight, linear_2_bias=linear_2_bias)
    for name, x in (guide | layers).items():
        norm = name.startswith("norm_")
        allowed = {features.dtype, norm_dtype, torch.float32} if norm else {features.dtype}
        if x is not None and x.dtype not in allowed:
            dtype = norm_dtype if norm else features.dtype
            raise TypeError(
                f"{name} must have the dtype of features, {dtype}{', or float32' if len(allowed) > 1 else ''}, got "
                f"{x.dtype}; convert one of them, or run under torch.autocast"
            )


def _check_weight(name: str, weight: Tensor | None, shape: str, before: str, x: Tensor) -> None:
    """`weight` [out, in] takes what `before`, x [..., in], gives."""
    if weight is not None and weight.dim() == 2 and 0 in weight.shape:
        raise ValueError(f"{name} must not be empty, got {list(weight.shape)}; pass the weight of nn.Linear, [out, in]")
    if weight is not None and (weight.dim() != 2 or weight.shape[1] != x.shape[-1]):
        given = list(x.shape if before == "features" else x.t().shape)
        raise ValueError(
            f"{name} must be [{shape}] with {shape[-2:].strip()} = {x.shape[-1]} to follow {before} {given}, got "
            f"{list(weight.shape)}; pass the weight of nn.Linear, [out, in]"
        )


def check_norm_eps(norm_eps: float) -> float:
    if not isinstance(norm_eps, (int, float)) or isinstance(norm_eps, bool):
        raise TypeError(f"norm_eps must be a float, got {type(norm_eps).__name__}; pass that of the layer norm")
    if not 0 <= norm_eps <= LARGEST:
        raise ValueError(f"norm_eps must be finite and not negative, got {norm_eps}; CLIP has 1e-5")
    return float(norm_eps)


def check_text(text_embeds: Tensor, features: Tensor, guide_weight: Tensor, cu_frames: Tensor | None) -> None:
    """[B, C], one prompt for each video, in the space that `guide_weight` [C, V] leads to."""
    batch = features.shape[0] if cu_frames is None else cu_frames.shape[0] - 1
    text, guide = list(text_embeds.shape), list(guide_weight.shape)
    if text_embeds.dim() != 2 or text[1] != guide[0]:
        raise ValueError(
            f"text_embeds must be [B, C] with C = {guide[0]} to match guide_weight {guide}, got {text}; "
            "use text embeddings and projection of one CLIP model"
        )
    _check_batch(text[0], batch, cu_frames)
    check_contiguous_channels("text_embeds", text_embeds)


def check_backend(backend: str | None, x: Tensor, order: Iterable[str] = backends.BACKENDS) -> str:
    """The backend to run: the first compatible one for None, else `backend` itself, or why it cannot run.

    `x` stands for all tensors of the call: `check_tensors` found them on one device, float64 all or none.
    """
    if backend is None:
        backend = backends.best_backend(x, order=order)
        if backend == "reference":
            _warn_of_reference(x)
    elif (reason := backends.why_not(backend, x)) is not None:
        raise ValueError(f"backend={backend!r} cannot run: {reason}")
    exports = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if exports and backend != "reference" and torch.onnx.is_in_onnx_export():
        raise RuntimeError(f"ONNX has no op for backend={backend!r}; export with backend='reference', plain PyTorch")
    return backend


# What an installation should have for tensors there, and the kinds of devices that a warning has spoken of.
_FASTER = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
_warned: set[str] = set()


def _warn_of_reference(x: Tensor) -> None:
    """Once for each kind of device: nobody asked for the slow reference, and an installation could run faster."""
    device = x.device.type
    if device not in _FASTER or device in _warned or torch.compiler.is_compiling():
        return
    if x.dtype == torch.float64 and device == "cuda":  # no backend computes it there
        return
    _warned.add(device)
    why = " ".join(f"{name}: {backends.why_not(name, x)}." for name in _FASTER[device])
    warnings.warn(
        f"the ops of ppllava_kernels run in plain PyTorch on {device} tensors, which is many times slower. {why} "
        "Pass backend='reference' where that is wanted",
        stacklevel=4,
    )
