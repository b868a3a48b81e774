"""Random calls of torch.ops.ppllava_kernels with arguments that may not fit together.

Each ends in a clean exception or in the numbers of the reference in float64; AddressSanitizer watches the kernels. Left
out, because no number is expected of them:

- scales beyond 100, where float32 cannot tell which of two patches is more relevant;
- fewer than 4 channels, whose cosines are 1 or -1 in the reference and within an eps of it in a kernel, so that their
  gradients are roundings alone;
- numbers of guide_relevance in 16 bits at a scale of 100, where the rounding of one embedding moves a relevance by some
  percent, which the rule of close.py judges for the public functions;
- numbers of a call whose tensors are all on meta, where there are none;
- numbers of guide_relevance_backward for arguments that were changed, since it trusts the cosines that it is given, and
  in 16 bits, which the rule of close.py judges for the public functions;
- a guide_weight of equal columns, which makes zero but for rounding of any normed row, and a cosine of that;
- None for a tensor that the schema wants: PyTorch hands it on, and Python's own AttributeError says so;
- more than 20 windows along an axis, besides numbers that are refused: their memory is the caller's to ask for.
"""

from __future__ import annotations

import math
import random

import torch
import torch.nn.functional as F

from ppllava_kernels.backends import reference
from ppllava_kernels.shapes import Window

OPS = torch.ops.ppllava_kernels
CLEAN = (ValueError, TypeError, RuntimeError, NotImplementedError)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 2**31, 2**40)
NEED = {
    "weighted_pool3d_backward": ("need_values", "need_weights"),
    "guide_relevance_backward": ("need_features", "need_text", "need_norm", "need_guide"),
    "hidden_pool3d_backward": ("need_features", "need_weights", "need_weight", "need_bias"),
}
NAMES = (
    "prompt_relevance",
    "prompt_relevance_backward",
    "weighted_pool3d",
    "prompt_guided_pool3d",
    "guide_relevance",
    "hidden_pool3d",
    *NEED,
)


class Fault(AssertionError):
    """What a call must not do."""


def check(seed: int) -> str:
    """One call; "refused" or "computed"."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    name, arguments = make(chance)
    changes = chance.choice((0, 1, 1, 1, 2, 3))
    for _ in range(changes):
        spoil(chance, arguments)
    try:
        actual = getattr(OPS, name)(**arguments)
    except CLEAN as error:
        if "\n" in str(error) and "INTERNAL ASSERT" in str(error):
            raise Fault(f"{describe(name, arguments)}: {error}") from error
        return "refused"
    except Exception as error:
        if isinstance(error, AttributeError) and "'NoneType' object" in str(error):
            return "refused"
        raise Fault(f"{describe(name, arguments)}: {type(error).__name__}: {error}") from error
    actual = (actual,) if isinstance(actual, torch.Tensor) else actual
    if all(a.is_meta for a in actual):
        return "computed"
    try:
        exact = expected(name, arguments)
    except Exception as error:
        raise Fault(f"{describe(name, arguments)}: numbers where the reference raises {error}") from error
    numbers = name != "guide_relevance_backward" or not changes
    if name.startswith("guide_relevance"):
        numbers = numbers and arguments["guide_weight"].stride(-1) != 0
    low = any(isinstance(x, torch.Tensor) and x.dtype in DTYPES[1:3] for x in arguments.values())
    for n, (a, e) in enumerate(zip(actual, exact, strict=True)):
        rounded = low and (
            name == "guide_relevance_backward" or (name, arguments.get("scale")) == ("guide_relevance", 100)
        )
        if e is not None and numbers and not rounded:
            compare(f"{describe(name, arguments)}: output {n}", a, e, 3e-2 if low else 3e-4)
    return "computed"


def compare(what: str, actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Where the reference has a number; NaN and infinity have their own tests."""
    if actual.shape != exact.shape:
        raise Fault(f"{what} has shape {list(actual.shape)} and not {list(exact.shape)}")
    finite = exact.isfinite()
    if not finite.any():
        return
    actual, exact = actual.double()[finite], exact[finite]
    error = ((actual - exact).abs().max() / exact.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise Fault(f"{what} is off by {error:.1e} of its largest element")


def make(chance: random.Random) -> tuple[str, dict]:
    """An op and arguments that fit."""
    name = chance.choice(NAMES)
    dtype = chance.choice(DTYPES)
    frames = [chance.randint(1, 4) for _ in range(chance.randint(1, 3))]
    cu_frames = None
    size = (len(frames), frames[0], chance.randint(1, 5), chance.randint(1, 5))
    if chance.random() < 0.4:
        cu_frames = torch.tensor([0, *frames]).cumsum(0).to(torch.int32)
        size = (sum(frames), *size[2:])
    shortest = frames[0] if cu_frames is None else min(frames)
    c, d, v = (chance.choice((4, 8, 17, 40)) for _ in range(3))
    accumulator = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    window = Window(*random_window(chance, (shortest, *size[-2:])))
    numbers = window._asdict() | dict(temperature=chance.choice((0.01, 0.3, 2.0)))
    prompt = dict(text_embeds=normal(len(frames), c), scale_tensor=None, scale=chance.choice((1.0, 20.0, -3.0)))
    if chance.random() < 0.3:
        prompt |= dict(scale_tensor=torch.tensor(2.5, dtype=accumulator), scale=1.0)
    weights = torch.rand(size, dtype=accumulator) if chance.random() < 0.8 else None
    where = dict(cu_frames=cu_frames, backend="cpp")
    linear = dict(linear_1_weight=normal(d, v), linear_1_bias=normal(d) if chance.random() < 0.5 else None)
    if name.startswith("prompt_relevance"):
        x = dict(image_embeds=normal(*size, c)) | prompt | where
    elif name.startswith("weighted_pool3d"):
        x = dict(values=normal(*size, d), weights=weights) | numbers | where
    elif name == "prompt_guided_pool3d":
        x = dict(values=normal(*size, d), image_embeds=normal(*size, c)) | prompt | numbers | where
    elif name.startswith("guide_relevance"):
        norm = {n: normal(v) if chance.random() < 0.7 else None for n in ("norm_weight", "norm_bias")}
        x = dict(features=normal(*size, v)) | prompt | norm | dict(norm_eps=1e-5, guide_weight=normal(c, v)) | where
    else:
        x = dict(features=normal(*size, v), weights=weights) | linear | numbers | where
    if name.endswith("backward"):
        x |= {need: chance.random() < 0.8 for need in NEED.get(name, ())}
        outputs = expected(name.removesuffix("_backward"), x)
        grad = torch.randn(outputs[0].shape, dtype=torch.float64)
        scores = {"prompt_relevance": ("relevance",), "guide_relevance": ("relevance", "cosines")}
        for n, score in enumerate(scores.get(name.removesuffix("_backward"), ())):
            x[score] = outputs[n].detach().to(accumulator)
        x["grad"] = grad.to(accumulator if "relevance" in name else dtype)
    return name, x


def random_window(chance: random.Random, size: tuple[int, int, int]) -> tuple[tuple, tuple, tuple]:
    if chance.random() < 0.4:
        return (), (), tuple(chance.randint(1, 4) for _ in size)
    return tuple(chance.randint(1, n) for n in size), tuple(chance.randint(1, 3) for _ in size), ()


def spoil(chance: random.Random, arguments: dict) -> None:
    """Change one argument, in place of the dict."""
    name = chance.choice(list(arguments))
    x = arguments[name]
    if name == "cu_frames":
        arguments[name] = random_cu_frames(chance, x)
    elif isinstance(x, torch.Tensor):
        arguments[name] = spoilt(chance, x, arguments)
    elif x is None:
        arguments[name] = torch.rand([chance.randint(0, 5) for _ in range(chance.randint(0, 5))])
    elif name in ("kernel_size", "stride", "output_size"):
        sizes = [chance.choice(NUMBERS) for _ in range(chance.choice((0, 1, 2, 3, 3, 3, 4)))]
        arguments[name] = sizes
    elif name == "temperature":
        arguments[name] = chance.choice((0.0, -1.0, math.nan, math.inf, 1e-46, 1e38))
    elif name == "backend":
        arguments[name] = chance.choice(("cuda", "triton", "reference", "", "cpp"))
    elif isinstance(x, bool):
        arguments[name] = not x
    elif name == "norm_eps":
        arguments[name] = chance.choice((0.0, 1e-3, 1.0))
    else:
        arguments[name] = chance.choice((0.0, 100.0, math.nan))


def random_cu_frames(chance: random.Random, x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None or chance.random() < 0.3:
        ends = [0, *(chance.randint(-1, 6) for _ in range(chance.randint(0, 3)))]
        x = torch.tensor(ends, dtype=torch.int32)
    changes = (
        lambda: None,
        lambda: x.long(),
        lambda: x[None],
        lambda: x + 1,
        lambda: x.flip(0),
        lambda: x[:-1],
        lambda: x[:0],
        lambda: torch.cat([x, x[-1:]]),
        lambda: x.float(),
        lambda: x.repeat_interleave(2)[::2],
    )
    return chance.choice(changes)()


def spoilt(chance: random.Random, x: torch.Tensor, arguments: dict) -> torch.Tensor | None:
    others = [y for y in arguments.values() if isinstance(y, torch.Tensor)]
    axis, other = (chance.randrange(max(1, x.dim())) for _ in range(2))
    changes = [
        lambda: None,
        lambda: x.to(chance.choice((*DTYPES, torch.int64, torch.bool))),
        lambda: x[None],
        lambda: chance.choice(others),
        lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype),
        lambda: torch.empty_like(x, device="meta"),
        lambda: x.clone().requires_grad_(x.is_floating_point()),
        lambda: -x,
    ]
    if x.dim():
        changes += [
            lambda: x[0] if x.shape[0] else x,
            lambda: x.narrow(axis, 0, x.shape[axis] // 2),
            lambda: x.narrow(axis, 0, 0),
            lambda: torch.cat([x, x], axis),
            lambda: x.transpose(axis, other),
            lambda: x.transpose(axis, other).contiguous().transpose(axis, other),
            lambda: x.narrow(axis, 0, min(1, x.shape[axis])).expand_as(x) if x.shape[axis] else x,
            lambda: torch.stack([x, x], axis).select(axis, 1),
            lambda: F.pad(x.float(), (1, 2)).to(x.dtype)[..., 1:-2],
            lambda: x.unsqueeze(axis),
            lambda: x.flatten(),
        ]
    return chance.choice(changes)()


def expected(name: str, x: dict) -> tuple[torch.Tensor | None, ...]:
    """The outputs in float64; None for those that nobody asked for."""
    # Also a random tensor in place of None is one.
    x = {k: y.detach().double() if isinstance(y, torch.Tensor) and k != "cu_frames" else y for k, y in x.items()}
    if name == "prompt_relevance":
        return (relevance(x),)
    if name == "prompt_relevance_backward":
        asked = ("image_embeds", "text_embeds")
        return *gradients(x, asked, lambda y: cosines(y, y["image_embeds"]), x["image_embeds"]), scale_gradient(x)
    if name == "guide_relevance":
        return relevance(x | dict(image_embeds=embeds(x))), cosines(x, embeds(x))
    if name == "guide_relevance_backward":
        asked = ("features", "text_embeds", "norm_weight", "norm_bias", "guide_weight")
        needs = ("need_features", "need_text", "need_norm", "need_norm", "need_guide")
        found = gradients(x, asked, lambda y: cosines(y, embeds(y)), x["features"])
        kept = [g if x[need] and x[k] is not None else torch.empty(0) for g, need, k in zip(found, needs, asked)]
        return kept[0], kept[1], scale_gradient(x), *kept[2:]
    if name == "prompt_guided_pool3d":
        scores = relevance(x)
        return pooled(x["values"], x | dict(weights=scores)), scores
    if name == "weighted_pool3d":
        return (pooled(x["values"], x),)
    if name == "hidden_pool3d":
        return (pooled(activated(x), x),)
    asked = ("values", "weights")
    function = lambda y: pooled(y["values"], y)  # noqa: E731
    if name == "hidden_pool3d_backward":
        asked = ("features", "weights", "linear_1_weight", "linear_1_bias")
        function = lambda y: pooled(activated(y), y)  # noqa: E731
    leaves = {k: x[k].clone().requires_grad_() for k in asked if x[k] is not None}
    out = function(x | leaves)
    found = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), x["grad"].view_as(out))))
    return tuple(found[k] if x[need] else torch.empty(0) for k, need in zip(asked, NEED[name]))


def relevance(x: dict) -> torch.Tensor:
    scale = x["scale"] if x["scale_tensor"] is None else x["scale"] * x["scale_tensor"]
    return reference.prompt_relevance(x["image_embeds"], x["text_embeds"], scale, x["cu_frames"])


def embeds(x: dict) -> torch.Tensor:
    norm = x["norm_weight"], x["norm_bias"]
    normed = F.layer_norm(x["features"], x["features"].shape[-1:], *norm, x["norm_eps"])
    return F.linear(normed, x["guide_weight"])


def of_patches(x: dict, text: torch.Tensor) -> torch.Tensor:
    """One row of text [B, C] for each patch."""
    if x["cu_frames"] is None:
        return text[:, None, None, None]
    counts = x["cu_frames"].diff()
    return text.repeat_interleave(counts, 0)[:, None, None]


def cosines(x: dict, image_embeds: torch.Tensor) -> torch.Tensor:
    return (reference._unit(image_embeds) * of_patches(x, reference._unit(x["text_embeds"]))).sum(-1)


def logit_gradient(x: dict, like: torch.Tensor) -> torch.Tensor:
    """dl_i = r_i (g_i - sum_j r_j g_j / sum_j r_j), over each clip."""
    counts = [like.shape[1]] * like.shape[0] if x["cu_frames"] is None else x["cu_frames"].diff().tolist()
    patches = like.shape[-3] * like.shape[-2]
    rows = zip(*(x[k].reshape(-1).split([n * patches for n in counts]) for k in ("grad", "relevance")))
    grads = [r * (g - (r * g).sum() / r.sum()) for g, r in rows]
    return (torch.cat(grads) if grads else x["grad"]).view(like.shape[:-1])


def gradients(x: dict, asked: tuple[str, ...], function, like: torch.Tensor) -> list[torch.Tensor | None]:
    """Of the sum of dl_i s cos_i, whose dl_i are constants."""
    scale = x["scale"] if x["scale_tensor"] is None else x["scale"] * x["scale_tensor"]
    leaves = {k: x[k].clone().requires_grad_() for k in asked if x[k] is not None}
    total = (logit_gradient(x, like) * scale * function(x | leaves)).sum()
    found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()))))
    return [found.get(k) for k in asked]


def scale_gradient(x: dict) -> torch.Tensor:
    image = x["image_embeds"] if "image_embeds" in x else embeds(x)
    return (logit_gradient(x, image) * cosines(x, image)).sum()


def activated(x: dict) -> torch.Tensor:
    return F.gelu(F.linear(x["features"], x["linear_1_weight"], x["linear_1_bias"]))


def pooled(values: torch.Tensor, x: dict) -> torch.Tensor:
    window = Window(tuple(x["kernel_size"]), tuple(x["stride"]), tuple(x["output_size"]))
    return reference.weighted_pool3d(values, x.get("weights"), window, x["temperature"], x["cu_frames"])


def describe(name: str, arguments: dict) -> str:
    def short(x):
        return f"{str(x.dtype)[6:]}{list(x.shape)}/{x.stride()}" if isinstance(x, torch.Tensor) else repr(x)

    return f"{name}({', '.join(f'{k}={short(x)}' for k, x in arguments.items())})"
