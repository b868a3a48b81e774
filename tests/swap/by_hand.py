"""What a compressed model computes, by hand: the stock model's tokens, pooled by the reference, in its language model.

Nothing here goes through `ppllava.swap`.
"""

from __future__ import annotations

import math

import families
import torch
import torch.nn.functional as F

from ppllava_kernels import pooled_size, weighted_pool3d

QWEN = ("qwen2_5_vl", "qwen3_vl")


def token_grids(name, model, processor, clips):
    """Of each clip (tokens [T, H, W, D], of deeper layers too; class tokens [T, D] or None; newline [1, D] or None)."""
    found = []
    for clip in clips:
        inputs = processor(text=families.prompt(name, "?"), videos=[clip], return_tensors="pt")
        base, dtype = model.model, model.dtype
        if name in QWEN:
            t, h, w = inputs["video_grid_thw"][0].tolist()
            output = base.get_video_features(inputs["pixel_values_videos"].to(dtype), inputs["video_grid_thw"])
            layers = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
            found.append(([layer[0].view(t, h // 2, w // 2, -1) for layer in layers], None, None))
            continue
        if name == "internvl":
            tokens = base.get_image_features(inputs["pixel_values"].to(dtype)).pooler_output  # [T, P, D]
        else:
            output = base.get_video_features(inputs["pixel_values_videos"].to(dtype)).pooler_output
            tokens = torch.cat(tuple(output)).reshape(-1, model.config.text_config.hidden_size)
        classes = newline = None
        if name == "llava_onevision":
            tokens, newline = tokens[:-1], tokens[-1:]
        tokens = tokens.reshape(len(clip), -1, tokens.shape[-1])
        if name == "video_llava":
            tokens, classes = tokens[:, 1:], tokens[:, 0]
        side = math.isqrt(tokens.shape[1])
        found.append(([tokens.unflatten(1, (side, side))], classes, newline))
    return found


def pixels(name, processor, clip):
    """float32 [T, 3, H, W] in 0 ... 1, as the stock video processor resizes them; of Qwen the first of each two."""
    inputs = processor(text=families.prompt(name, "?"), videos=[clip], return_tensors="pt")
    video = processor.video_processor
    mean, std = (torch.tensor(x)[:, None, None] for x in (video.image_mean, video.image_std))
    if name in QWEN:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        p = video.patch_size
        options = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
        frames = torch.from_numpy(clip).permute(0, 3, 1, 2)
        frames = torch.cat([frames, frames[-1:]])[: 2 * t]
        assert frames.shape[2:] == (h * p, w * p)  # the clips of the tests are not resized
        options |= {"image_mean": video.image_mean, "image_std": video.image_std}
        return video.rescale_and_normalize(frames, **options)[::2] * std + mean
    frames = inputs["pixel_values" if name == "internvl" else "pixel_values_videos"]
    return (frames[0] if frames.dim() == 5 else frames) * std + mean


def relevance(name, model, guide, words, question, frames, own: bool):
    """[T, h, w] of one clip: a softmax over all patches of 100 cos(patch, question)."""
    siglip = guide.config.model_type == "siglip"
    vision, size = guide.vision_model, guide.config.vision_config.image_size
    dtype = vision.post_layernorm.weight.dtype
    if own:
        tower = getattr(model.model, "video_tower" if name == "video_llava" else "vision_tower")
        stock = families.built(name)[1].video_processor
        mean, std = (torch.tensor(x)[:, None, None] for x in (stock.image_mean, stock.image_std))
        layer = model.config.vision_feature_layer
        hidden = tower(((frames - mean) / std).to(dtype), output_hidden_states=True).hidden_states[layer]
    else:
        mean = torch.tensor([0.5] * 3 if siglip else [0.48145466, 0.4578275, 0.40821073])[:, None, None]
        std = torch.tensor([0.5] * 3 if siglip else [0.26862954, 0.26130258, 0.27577711])[:, None, None]
        frames = F.interpolate(frames, (size, size), mode="bilinear", antialias=True)
        hidden = vision(((frames - mean) / std).to(dtype), output_hidden_states=True)
        hidden = hidden.hidden_states[-1 if siglip else -2]
    side = size // guide.config.vision_config.patch_size
    x = vision.post_layernorm(hidden[:, hidden.shape[1] - side * side :])  # [T, P, V]
    ids = words(question, return_tensors="pt")["input_ids"]
    if siglip:
        attention, length = vision.head.attention, guide.config.text_config.max_position_embeddings
        v = F.linear(x, attention.in_proj_weight[-x.shape[-1] :], attention.in_proj_bias[-x.shape[-1] :])
        e = v + vision.head.mlp(vision.head.layernorm(v))
        ids = F.pad(ids, (0, length - ids.shape[1]), value=words.pad_token_id)
        c = guide.text_model(ids).pooler_output
    else:
        e, c = guide.visual_projection(x), guide.text_projection(guide.text_model(ids).pooler_output)
    scores = guide.logit_scale.to(torch.promote_types(dtype, torch.float32)).exp() * F.cosine_similarity(e, c, dim=-1)
    return scores.flatten().softmax(0).view(len(x), side, side)


def on_grid(relevance, height, width):
    """relevance [T, h, w] spread over a grid [T, H, W] of equal area: both are cut into cells of one size."""
    _, h, w = relevance.shape
    cells = relevance.repeat_interleave(height, 1).repeat_interleave(width, 2) / (height * width)  # [T, h * H, w * W]
    return cells.unflatten(2, (width, w)).sum(3).unflatten(1, (height, h)).sum(2)


def pooled_tokens(grids, weights, **window):
    """Of each clip ([tokens, D] of each layer, (To, Ho, Wo)); of the clips of `token_grids`."""
    results = []
    temperature = {"temperature": window["temperature"]} if "temperature" in window else {}
    for (layers, classes, newline), weight in zip(grids, weights):
        size = tuple(layers[0].shape[:3])
        one = {name: value for name, value in window.items() if name not in temperature}
        if (kernel := window.get("kernel_size")) and size[0] < kernel[0]:
            one["kernel_size"] = (size[0], *kernel[1:])
        options = {**one, **temperature, "backend": "reference"}
        weight = None if weight is None else weight[None]
        pooled = [weighted_pool3d(layer[None], weight, **options)[0] for layer in layers]
        shape = pooled_size(size, **one)
        if classes is not None:
            frames = {name: (value[0], 1, 1) for name, value in one.items()}
            means = weighted_pool3d(classes[None, :, None, None], None, **frames, backend="reference")[0, :, 0]
            pooled = [torch.cat([means, pooled[0].flatten(1, 2)], 1)]
        rows = [layer.reshape(-1, layer.shape[-1]) for layer in pooled]
        results.append(([torch.cat([rows[0], newline])] if newline is not None else rows, shape))
    return results


def positions(name, model, inputs, shapes, seconds=None):
    """position_ids [3, N, S] of Qwen, counted token by token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    video, result, clips = model.config.video_token_id, torch.zeros(3, *ids.shape, dtype=torch.long), iter(shapes)
    for n, row in enumerate(ids):
        at, i, left = 0, int((mask[n] == 0).sum()), []
        while i < len(row):
            if row[i] != video:
                result[:, n, i], at, i = at, at + 1, i + 1
                continue
            if not left:
                (t, h, w), step = next(clips), 1.0 if seconds is None else seconds.pop(0)
                left = [(0, h, w, 0)] * t if name == "qwen3_vl" else [(t, h, w, step)]
            t, h, w, step = left.pop()
            for frame in range(max(t, 1)):
                for y in range(h):
                    for x in range(w):
                        result[:, n, i] = torch.tensor([at + int(frame * step), at + y, at + x])
                        i += 1
            at += max(h, w)
    return result


def logits(name, model, inputs, tokens, seconds=None):
    """Of the stock model's language model, for the placeholders of `inputs` replaced by these tokens."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    token = model.config.image_token_id if name == "internvl" else model.config.video_token_id
    places = ids == token  # [N, S]
    embeds = model.get_input_embeddings()(ids)
    layers = [torch.cat(layer) for layer in zip(*(rows for rows, _ in tokens))]
    assert int(places.sum()) == len(layers[0])
    embeds = embeds.masked_scatter(places[..., None], layers[0].to(embeds.dtype))
    given = {}
    if name in QWEN:
        given["position_ids"] = positions(name, model, inputs, [shape for _, shape in tokens], seconds)
    if len(layers) > 1:
        given |= {"visual_pos_masks": places, "deepstack_visual_embeds": [x.to(embeds.dtype) for x in layers[1:]]}
    hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, **given).last_hidden_state
    return model.lm_head(hidden)
