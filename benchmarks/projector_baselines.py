"""The whole projector: ours, the original's, the same in plain PyTorch that pools first, the reference, its products.

All take the tensors of shapes.make_projector by name and return pooled [B, To, Ho, Wo, D].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ppllava_kernels
from ppllava.guide import FRAMES
from ppllava_kernels.backends import reference
from ppllava_kernels.shapes import make_window

from . import timing
from .baselines import LOGIT_SCALE, TEMPERATURE, original_pool, original_relevance, original_window
from .shapes import LAYERS, ProjectorShape

Tensors = Mapping[str, Tensor]
Peer = Callable[[Tensors], Tensor]
CLIP_EPS, SIGLIP_EPS = 1e-5, 1e-6
PART = 32 * 1024  # patches that the reference, in float64, takes at a time; for more it would need hundreds of GB
STEPS = 4  # towards the wanted cosines
PIECE = 1 << 17  # rows of a product at a time; more are not faster and need their memory


def embed_patches(features: Tensor, t: Tensors) -> Tensor:
    """features [B, T, H, W, V] -> image_embeds [B, T, H, W, C], as ppllava.guide does."""
    siglip = "value_weight" in t
    eps = SIGLIP_EPS if siglip else CLIP_EPS
    normed = F.layer_norm(features, features.shape[-1:], t["norm_weight"], t["norm_bias"], eps)
    if not siglip:
        return F.linear(normed, t["guide_weight"])
    values = F.linear(normed, t["value_weight"], t["value_bias"])
    hidden = F.layer_norm(values, values.shape[-1:], t["mlp_norm_weight"], t["mlp_norm_bias"], eps)
    hidden = F.gelu(F.linear(hidden, t["fc1_weight"], t["fc1_bias"]), approximate="tanh")
    return values + F.linear(hidden, t["fc2_weight"], t["fc2_bias"])


def make_projector(
    shape: ProjectorShape, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> dict[str, Tensor]:
    """Features, text and weights by name. The cosines spread as in `make_inputs`; weights as 1 / sqrt(fan in)."""
    generator, sizes = torch.Generator(device).manual_seed(seed), shape.axis_sizes

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    t = {"features": randn(*shape.grid, sizes["V"]), "text_embeds": randn(shape.batch, sizes["C"])}
    for name, axes in [*shape.guide.items(), *LAYERS.items()]:
        x = randn(*(sizes[axis] for axis in axes))
        t[name] = x / sizes[axes[1]] ** 0.5 if len(axes) == 2 else 0.1 * x + name.endswith("norm_weight")
    cosine = 0.2 + 0.02 * randn(*shape.grid)  # [B, T, H, W]
    lead = t["value_weight" if shape.mlp_channels else "guide_weight"]  # [C, V]
    # Along this axis of the features, e . c grows; |e| hardly does, so that a few steps lead there.
    axis = F.normalize(t["text_embeds"], dim=-1) @ lead * t["norm_weight"]  # [B, V]
    axis = (axis / axis.square().sum(-1, keepdim=True))[:, None, None, None]
    for _ in range(STEPS):
        embeds = embed_patches(t["features"], t)  # [B, T, H, W, C]
        missing = (cosine - _cosine(embeds, t["text_embeds"])) * embeds.norm(dim=-1)
        t["features"] += missing.unsqueeze(-1) * axis
    return {name: x.to(dtype) for name, x in t.items()}


def layers(t: Tensors) -> dict[str, Tensor]:
    return {name: t[name] for name in LAYERS}


def ours(shape: ProjectorShape, backend: str | None) -> Peer:
    """What the model does: one op or, where the guide is SigLIP's, the library's products and two."""
    window = {**shape.window, "temperature": TEMPERATURE, "backend": backend}
    guide = {"logit_scale": LOGIT_SCALE, "backend": backend}

    def run(t: Tensors) -> Tensor:
        if not shape.mlp_channels:
            return ppllava_kernels.prompt_guided_project(**t, norm_eps=CLIP_EPS, **{**window, **guide})
        features = t["features"]
        # A few frames at a time, as PPLlavaGuide.look: the MLP is wider than all else.
        parts = features.split(FRAMES, 1)
        if torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False}
            embeds = [checkpoint(embed_patches, part, t, **options) for part in parts]
        else:
            embeds = [embed_patches(part, t) for part in parts]
        relevance = ppllava_kernels.prompt_relevance(torch.cat(embeds, 1), t["text_embeds"], **guide)
        return ppllava_kernels.weighted_project(features, relevance, **layers(t), **window)

    return run


def original(shape: ProjectorShape) -> Peer:
    """PPLLaVA's: both layers on all patches, then its unfold."""

    def run(t: Tensors) -> Tensor:
        features = t["features"]
        relevance = original_relevance(embed_patches(features, t), t["text_embeds"])
        hidden = F.gelu(F.linear(features, t["linear_1_weight"], t["linear_1_bias"]))
        values = F.linear(hidden, t["linear_2_weight"], t["linear_2_bias"])  # [B, T, H, W, D]
        return original_pool(values, relevance, shape.window)

    return run


def _cosine(image: Tensor, text: Tensor) -> Tensor:
    """[B, T, H, W], in float32 or better."""
    dtype = torch.promote_types(image.dtype, torch.float32)
    return F.cosine_similarity(image.to(dtype), text.to(dtype)[:, None, None, None], dim=-1)


def reordered(shape: ProjectorShape) -> Peer:
    """The same in plain PyTorch, pooled before the second layer; for windows that do not overlap."""
    outputs = shape.pooled_sizes[0]

    def run(t: Tensors) -> Tensor:
        features = t["features"]
        kernel, _ = original_window(tuple(features.shape[1:4]), shape.kernel_size, shape.output_size)
        (to, ho, wo), (kt, kh, kw) = outputs, kernel
        logits = LOGIT_SCALE * _cosine(embed_patches(features, t), t["text_embeds"])
        relevance = logits.flatten(1).softmax(-1).view_as(logits)

        def windows(x: Tensor) -> Tensor:
            """[B, T, H, W, ...] -> [B, To, kt, Ho, kh, Wo, kw, ...], without the leftover frames."""
            return (
                x[:, : to * kt, : ho * kh, : wo * kw]
                .unflatten(3, (wo, kw))
                .unflatten(2, (ho, kh))
                .unflatten(1, (to, kt))
            )

        scores = windows(relevance).permute(0, 1, 3, 5, 2, 4, 6) / TEMPERATURE  # [B, To, Ho, Wo, kt, kh, kw]
        shares = scores.flatten(4).softmax(-1).view(scores.shape).permute(0, 1, 4, 2, 5, 3, 6)
        hidden = F.gelu(F.linear(features, t["linear_1_weight"], t["linear_1_bias"]))  # [B, T, H, W, D']
        pooled = (windows(hidden) * shares.unsqueeze(-1).to(hidden.dtype)).sum((2, 4, 6))  # [B, To, Ho, Wo, D']
        return F.linear(pooled, t["linear_2_weight"], t["linear_2_bias"])

    return run


def plain_reference(shape: ProjectorShape) -> Peer:
    """The reference backend, without the library around it; many patches part by part."""
    window = make_window(**shape.window)

    def run(t: Tensors) -> Tensor:
        if shape.tokens > PART:
            return _in_parts(shape, t)
        features, text = t["features"], t["text_embeds"]
        if shape.mlp_channels:
            relevance = reference.prompt_relevance(embed_patches(features, t), text, LOGIT_SCALE, None)
            return reference.weighted_project(features, relevance, *layers(t).values(), window, TEMPERATURE, None)
        guide = t["norm_weight"], t["norm_bias"], CLIP_EPS, t["guide_weight"], *layers(t).values()
        return reference.prompt_guided_project(features, text, LOGIT_SCALE, *guide, window, TEMPERATURE, None)[0]

    return run


def _in_parts(shape: ProjectorShape, t: Tensors) -> Tensor:
    """No window lies in two parts; a backward computes each part again."""
    features, text = t["features"], t["text_embeds"]
    kernel, _ = original_window(tuple(features.shape[1:4]), shape.kernel_size, shape.output_size)
    frames = kernel[0] * shape.pooled_sizes[0][0]  # the leftover ones are in the softmax only
    step = kernel[0] * max(1, PART // (shape.height * shape.width * kernel[0]))
    # Wide, so that the gradients of the parts are not rounded before they are summed.
    wide = {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in t.items() if name != "features"}

    def cosines(part: Tensor) -> Tensor:
        return _cosine(embed_patches(part, {name: x.to(part.dtype) for name, x in wide.items()}), text)

    def project(part: Tensor, relevance: Tensor) -> Tensor:
        weights = (wide[name].to(part.dtype) for name in LAYERS)
        return reference.weighted_project(part, relevance, *weights, make_window(kernel), TEMPERATURE, None)

    def each(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        parts = zip(*(x.split(step, 1) for x in tensors))
        return torch.cat([checkpoint(function, *some, use_reentrant=False) for some in parts], 1)

    logits = LOGIT_SCALE * each(cosines, features)
    relevance = logits.flatten(1).softmax(1).view_as(logits)
    return each(project, features[:, :frames], relevance[:, :frames])


def products_variant(shape: ProjectorShape, t: Tensors, direction: str) -> timing.Variant:
    """The ceiling: the matrix products that nobody avoids, alone, into memory that is there already."""
    jobs = []
    for product in shape.products():
        weight, rows = t[product.weight], min(product.rows, PIECE)
        features = t["features"].flatten(0, -2)
        x = features if product.inner == features.shape[-1] and product.rows == len(features) else None
        x = torch.randn(rows, product.inner, device=weight.device).to(weight) if x is None else x
        jobs.append((product, x, weight, weight.new_empty(rows, product.outer), torch.empty_like(x[:rows])))
    gradients = [torch.empty_like(weight) for _, _, weight, *_ in jobs] if direction != "forward" else []

    def run(_: object) -> None:
        for n, (product, x, weight, result, grad) in enumerate(jobs):
            for first in range(0, product.rows, PIECE):
                some = x[first : first + PIECE] if len(x) == product.rows else x[: product.rows - first]
                out = result[: len(some)]
                torch.mm(some, weight.t(), out=out)
                if direction != "forward":
                    torch.mm(out, weight, out=grad[: len(some)])
                    torch.mm(out.t(), some, out=gradients[n])

    return timing.Variant("products", run)
