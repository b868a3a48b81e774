"""The golden cases of the whole model as inputs of this model."""

from dataclasses import dataclass, field

import torch
from golden_data import golden, meta

PADS = {"model": 0, "model_qwen": 81}


@dataclass
class Batch:
    """A golden case. `rows` are the prompts, expanded, as (id, attended) pairs."""

    case: str
    name: str
    rows: list = field(default_factory=list)
    media: dict = field(default_factory=dict)

    def outputs(self):
        prefix = f"{self.name}/"
        outputs = golden(self.case, "outputs")
        return {name.removeprefix(prefix): x for name, x in outputs.items() if name.startswith(prefix)}

    def inputs(self, side="left"):
        """The inputs of `forward`, padded on one side."""
        length = max(map(len, self.rows))
        pad = [(PADS[self.case], 0)]
        rows = [
            pad * (length - len(row)) + row if side == "left" else row + pad * (length - len(row)) for row in self.rows
        ]
        ids = torch.tensor([[token for token, _ in row] for row in rows])
        return {
            "input_ids": ids,
            "attention_mask": torch.tensor([[seen for _, seen in row] for row in rows]),
            **self.media,
        }


def source(case, name):
    """Whose inputs a case uses."""
    return meta(case)["cases"][name].get("inputs_of", name)


def tensor(case, name, key):
    """An input of a case, which may be another's."""
    given, path = meta(case), f"{source(case, name)}/{key}"
    shared = {**given.get("shared_inputs", {}), **given["cases"][name].get("shared_inputs", {})}
    return golden(case, "inputs").get(shared.get(path, path))


def media_types(case, name):
    return meta(case)["cases"][name].get("media_types") or ["video"] * len(tensor(case, name, "input_ids"))


def batch(model, case, name, only=None):
    """The case with all of its prompts, or `only` one of them; padding inside of the prompts is left out."""
    types, made = media_types(case, name), Batch(case, name)
    ids, attended = tensor(case, name, "input_ids"), tensor(case, name, "attention_mask")
    pooling, config = model.config.visual_pooling, model.config
    images = {"pixel_values": [], "image_sizes": [], "image_views": [], "image_groups": []}
    videos = {"pixel_values_videos": [], "video_frames": []}
    asked = {"image": [], "video": []}
    for i in range(len(ids)) if only is None else [only]:
        pixels = tensor(case, name, f"pixel_values_{i}")
        tokens, placeholder = 0, config.video_token_id
        if pixels is not None and types[i] == "video":
            videos["pixel_values_videos"].append(pixels[:, 0].float())
            videos["video_frames"].append(len(pixels))
            tokens = pooling.video_tokens(len(pixels))
            asked["video"].append(i)
        elif pixels is not None:
            in_list, placeholder = types[i] == "multi-image", config.image_token_id
            views = pixels[:, 0] if in_list else pixels[0]  # [V, 3, S, S]
            size = tensor(case, name, "image_sizes")[i].tolist()
            count = len(views) if in_list else 1
            images["pixel_values"].append(views.float())
            images["image_sizes"] += [size] * count
            images["image_views"] += [1] * count if in_list else [len(views)]
            images["image_groups"].append(count)
            tokens = pooling.image_tokens(size, len(views) // count, in_list)
            asked["image"].append(i)
        row = []
        for token, seen in zip(ids[i].tolist(), attended[i].tolist()):
            if seen:
                row += [(placeholder, 1)] * tokens if token == config.image_token_id else [(token, 1)]
        made.rows.append(row)
    for group in (images, videos):
        for key, value in group.items():
            if value:
                made.media[key] = torch.cat(value) if key.startswith("pixel") else torch.tensor(value)
    if asked["image"] or asked["video"]:
        order = asked["image"] + asked["video"]
        made.media["guide_input_ids"] = tensor(case, name, "clip_ids")[order]
        mask = tensor(case, name, "clip_mask")
        if mask is not None:
            made.media["guide_attention_mask"] = mask[order]
    return made


def together(singles):
    """Cases of one prompt each as one batch."""
    made = Batch(singles[0].case, singles[0].name)
    made.rows = [row for single in singles for row in single.rows]
    images, videos = ([x.media for x in singles if key in x.media] for key in ("pixel_values", "pixel_values_videos"))
    for media in (*images, *videos):  # questions about images come first
        for key, value in media.items():
            made.media[key] = torch.cat([made.media[key], value]) if key in made.media else value
    return made
