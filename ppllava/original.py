"""The format of the original implementation, `LlavaInterleaveForConditionalGeneration`: config.json and weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, CLIPConfig, PreTrainedConfig, SiglipTextConfig

from .compat import ACT2FN, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from .sizes import check_sizes
from .weights import Weights, put, read_json

ARCHITECTURE = "LlavaInterleaveForConditionalGeneration"

POOLINGS = {
    "ppllava": "prompt_guided",
    "avp": "temporal_mean",
    "none": "none",
    "pllava": "adaptive_mean",
    "pllava_npu": "adaptive_mean",
}

# The text towers of the models that the original's own configurations name, so that these load without their folders.
_TOWERS = {
    "clip-vit-large-patch14-336": {
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 768,
            "bos_token_id": 0,
            "eos_token_id": 2,  # not an id that questions end with: the largest id is pooled, which is CLIP's EOS
            "pad_token_id": 1,
        },
    },
    "siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "text_config": {
            "vocab_size": 32000,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "projection_size": 1152,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
    },
}

_TEXT_TOWER = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "projection_dim",
    "projection_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# Keys of the original -> keys of the model. What none matches only lacks "model.", which transformers adds.
RENAMES = (
    (r"^vision_tower\.vision_model\.btadapter_cls_token$", "model.vision_tower.adapter.class_token"),
    (r"^vision_tower\.vision_model\.btadapter_time_embed\.", "model.vision_tower.adapter.time_embedding."),
    (r"^vision_tower\.vision_model\.btadapter_S_layers\.", "model.vision_tower.adapter.spatial_layers."),
    (r"^vision_tower\.vision_model\.btadapter_T_layers\.", "model.vision_tower.adapter.temporal_layers."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.clip_text_model\.", "model.guide.text_model."),
    (r"^multi_modal_projector\.clip_visual_ln\.", "model.guide.norm."),
    (r"^multi_modal_projector\.clip_visual_head\.", "model.guide.head."),
    (r"^multi_modal_projector\.clip_visual_projection\.", "model.guide.visual_projection."),
    (r"^multi_modal_projector\.clip_text_projection\.", "model.guide.text_projection."),
)
# Renamed already; the original's names of a stretched table do not end with ".weight".
POSITION = "model.guide.text_model.embeddings.position_embedding"
POSITION_TAIL = f"{POSITION}_res"
POSITION_WEIGHT = f"{POSITION}.weight"
LOGIT_SCALE = "model.guide.logit_scale"
KEPT_POSITIONS = 20


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is one of the original's."""
    architectures = config.get("architectures")
    named = isinstance(architectures, list) and ARCHITECTURE in architectures
    return config.get("model_type") != "ppllava" and (named or {"pooling", "clip_weight", "btadapter"} <= config.keys())


def translate_config(
    config: dict[str, Any], folder: str | os.PathLike, clip: str | os.PathLike | None = None
) -> dict[str, Any]:
    """The original's config.json as arguments of `PPLlavaConfig.from_dict`.

    Args:
        config: content of the file.
        folder: where it lies; a `clip_weight` in it is read, one elsewhere is not.
        clip: folder of the CLIP or SigLIP model instead of the one that `clip_weight` names. Its config.json describes
            the text tower, which the original's does not.

    Raises:
        ValueError: for what the model cannot be, or where the text tower is not known.
        FileNotFoundError: if `clip` has no config.json.
    """
    from .configuration_ppllava import PPLlavaConfig  # which imports this module

    with describing(Path(folder, "config.json")):
        translated = _translate(config, folder, clip)
        PPLlavaConfig.from_dict(translated)
    return translated


@contextmanager
def describing(file: Path) -> Iterator[None]:
    """Errors of values that no check expects, as one sentence that names the config.json; ours are as they are."""
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "; " in str(error):  # which says what to do
            raise
        cause = error.__cause__ or error  # of a strict dataclass
        reason = re.split(r"\. |\.?\n|\.$", str(cause))[0]
        if not isinstance(cause, (TypeError, ValueError)):
            reason = f"{type(cause).__name__}: {reason}"
        raise ValueError(f"{str(file)!r} must describe a PPLLaVA, but {reason}; correct it") from None


def _translate(config: dict[str, Any], folder: str | os.PathLike, clip: str | os.PathLike | None) -> dict[str, Any]:
    siglip = bool(config.get("qwen"))
    vision, text = _section(config, "vision_config"), _section(config, "text_config")
    vision.setdefault("model_type", "siglip_vision_model" if siglip else "clip_vision_model")
    text.setdefault("model_type", "qwen2" if siglip else "llama")
    _check_types(config, vision, text)
    check_sizes("text_config", text)  # before transformers makes a list of its layers
    _check(config, vision, siglip)
    tower, projection_dim = _tower(config.get("clip_weight"), folder, clip, siglip)
    guide = {name: getattr(tower, name) for name in _TEXT_TOWER if hasattr(tower, name)}
    if config.get("extend_clip"):
        guide["max_position_embeddings"] = 4 * guide["max_position_embeddings"] - 3 * KEPT_POSITIONS
    vision.pop("depth", None), vision.pop("max_T", None)
    if config.get("btadapter"):
        vision["model_type"] = "ppllava_btadapter_vision_model"
        vision["adapter_depth"] = config.get("btadapter_depth", 4)
        vision["adapter_max_frames"] = config.get("max_T", 128)
    vocabulary = AutoConfig.for_model(**text).vocab_size
    image = config.get("image_token_index", 151646 if siglip else 32000)
    # LLaVA's vocabulary is padded: its last row is unused, and nothing but the processor depends on which row it is.
    last = vocabulary - 1 if image != vocabulary - 1 else vocabulary - 2
    translated = {
        "model_type": "ppllava",
        "vision_config": vision,
        "guide_config": guide,
        "text_config": text,
        "projector_hidden_act": config.get("projector_hidden_act", "gelu"),
        "vision_feature_layer": config.get("vision_feature_layer", -1 if siglip else -2),
        "pooling_temperature": config.get("pooling_temp", 0.01),
        "valuew_plus": bool(config.get("valuew_plus")),
        "image_grid_pinpoints": config.get("image_grid_pinpoints"),
        "image_token_index": image,
        "video_token_index": config.get("video_token_index", last),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        **_pooling(config),
    }
    if not siglip:
        translated["projection_dim"] = projection_dim
    if dtype := config.get("dtype", config.get("torch_dtype")):
        translated["dtype"] = dtype
    return translated


def rename(key: str) -> str:
    """The name in :class:`PPLlavaForConditionalGeneration` of a weight of the original."""
    for pattern, name in RENAMES:
        key = re.sub(pattern, name, key)
    if key == "multi_modal_projector.logit_scale":
        return LOGIT_SCALE
    return key if key.startswith("model.") else f"model.{key}"


def by_name(weights: Weights) -> tuple[Weights, list[str]]:
    """(weights by their names in the model, keys that are spare: of one table beside the original's two).

    Raises:
        ValueError: for two keys of one weight.
    """
    named: Weights = {}
    for key, weight in weights.items():
        put(named, rename(key), weight)
    spare = POSITION_WEIGHT in named and (POSITION in named or POSITION_TAIL in named)
    return named, [named.pop(POSITION_WEIGHT).key] if spare else []


def fold_positions(table: Tensor, tail: Tensor, shape: Iterable[int]) -> Tensor:
    """The table [L, D] that the original adds up of two masked ones: rows 0 ... 19 of `table`, the others of `tail`.

    If one has another shape than `shape`, it is returned as it is, for the checks of shapes to name it.
    """
    for wrong in (table, tail):
        if wrong.shape != torch.Size(shape):
            return wrong
    return torch.cat([table[:KEPT_POSITIONS], tail[KEPT_POSITIONS:]])


def unused_keys(config) -> list[str]:
    """Patterns of the (renamed) weights of the original that no output of the model depends on, so that it has none.

    Layers above `vision_feature_layer` and those of the adapter beside them, the tower's last norm (the guide has its
    own), SigLIP's pooling head in the tower, and the bias of its logits, which the softmax cancels. Buffers that old
    versions of transformers wrote.
    """
    vision, layers = config.vision_config, config.vision_layers
    tower = r"^(model\.)?vision_tower\."
    keys = [rf"{tower}post_layernorm\.", r"(^|\.)position_ids$", r"rotary_emb\.inv_freq$"]
    if above := range(layers, vision.num_hidden_layers):
        keys.append(rf"{tower}encoder\.layers\.{_one_of(above)}\.")
    if config.siglip:
        keys += [rf"{tower}head\.", r"^(model\.)?multi_modal_projector\.logit_bias$"]
    depth = getattr(vision, "adapter_depth", 0)
    reached = max(0, layers - (vision.num_hidden_layers - depth))
    if depth and not reached:
        keys.append(rf"{tower}adapter\.")
    elif above := range(reached, depth):
        keys.append(rf"{tower}adapter\.(spatial|temporal)_layers\.{_one_of(above)}\.")
    return keys


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no regular file, or not a JSON object.
    """
    path = Path(folder, "config.json")
    if not path.exists():
        raise FileNotFoundError(
            f"{str(folder)!r} must be a folder with a config.json, got none; pass the model's folder"
        )
    return read_json(path)


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(config.get(name), dict):
        raise ValueError(
            f"config.json must have a {name}, got {config.get(name)!r}; use the one that the original saved"
        )
    return dict(config[name])


_FLAGS = ("qwen", "btadapter", "extend_clip", "valuew_plus")


def _check_types(config: dict[str, Any], vision: dict[str, Any], text: dict[str, Any]) -> None:
    """Raise a TypeError for what would only fail later, or not at all."""
    for section, name in (
        (config, "tie_word_embeddings"),
        (text, "tie_word_embeddings"),
        *((config, x) for x in _FLAGS),
    ):
        if not isinstance(section.get(name, False), bool) and not (name in _FLAGS and section[name] is None):
            raise TypeError(f"{name} must be true or false, got {section[name]!r}")
    for name in ("clip_weight", "clip_post_pretrain"):
        if not isinstance(config.get(name), str | None):
            raise TypeError(f"{name} must be the folder or name of a model, got {config[name]!r}")
    for section, name in ((config, "projector_hidden_act"), (vision, "hidden_act"), (text, "hidden_act")):
        act = section.get(name, "gelu")
        if not isinstance(act, str) or act not in ACT2FN:
            raise TypeError(f"{name} must be an activation of transformers, got {act!r}")
    for name in ("image_size", "patch_size"):
        if not isinstance(size := vision.get(name, 1), int) or size < 1:
            raise TypeError(f"{name} of vision_config must be a positive number of pixels, got {size!r}")
    for name in ("dtype", "torch_dtype"):
        if (dtype := config.get(name)) and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise TypeError(f"{name} must be that of weights, such as 'bfloat16', got {dtype!r}")
    if text["model_type"] not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise TypeError(f"text_config must be that of a language model of transformers, got {text['model_type']!r}")


def _check(config: dict[str, Any], vision: dict[str, Any], siglip: bool) -> None:
    expected = "siglip_vision_model" if siglip else "clip_vision_model"
    if vision["model_type"] != expected:
        raise ValueError(
            f"vision_config must have model_type {expected!r} where qwen is {siglip}, got {vision['model_type']!r}; "
            "the original has no other towers"
        )
    if siglip and config.get("btadapter"):
        raise ValueError("btadapter must be false where qwen is true, got true; the BT-Adapter is for CLIP")
    strategy = "full" if siglip else "default"
    if (got := config.get("vision_feature_select_strategy", strategy)) != strategy:
        raise ValueError(
            f"vision_feature_select_strategy must be {strategy!r} for {expected}, got {got!r}; the others would make "
            "tokens that are no patches"
        )
    side = vision.get("image_size", 224) // vision.get("patch_size", 16 if siglip else 32)
    if (frame := config.get("frame_shape")) not in (None, [side, side], (side, side)):
        raise ValueError(
            f"frame_shape must be the {[side, side]} patches of vision_config, got {frame}; correct config.json"
        )


def _pooling(config: dict[str, Any]) -> dict[str, Any]:
    name = config.get("pooling", "avp")
    if name not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {name!r}; correct config.json")
    kernel, stride, shape = (config.get(key) for key in ("pooling_kernel", "pooling_stride", "pllava_pooling_shape"))
    if name == "ppllava" and (kernel is None) == (shape is None):
        both = "neither" if kernel is None else "both"
        raise ValueError(
            f"config.json must have either pooling_kernel or pllava_pooling_shape for ppllava, got {both}; leave one"
        )
    windows = {"pooling_kernel_size": kernel, "pooling_stride": stride, "pooling_output_size": shape}
    windows["image_pooling_kernel_size"] = config.get("image_pooling_kernel")
    windows["image_pooling_stride"] = config.get("image_pooling_stride")
    return {"pooling": POOLINGS[name], **{key: value for key, value in windows.items() if value is not None}}


def clip_folder(weight: str | None, folder: str | os.PathLike) -> Path | None:
    """The folder in `folder` that `clip_weight` names. None if it names a place elsewhere: a checkpoint must not choose
    what else is read on this machine."""
    if not weight or os.path.isabs(weight) or ".." in re.split(r"[/\\]", weight):
        return None
    return Path(folder, weight)


def _tower(
    weight: str | None, folder: str | os.PathLike, clip: str | os.PathLike | None, siglip: bool
) -> tuple[PreTrainedConfig, int | None]:
    """(configuration of the text tower that guides, projection_dim of CLIP)."""
    named = clip_folder(weight, folder)
    if clip is None and named is not None and (named / "config.json").exists():
        clip = named
    source = weight if clip is None else clip
    known = os.path.basename((weight or "").rstrip("/\\"))
    config = _TOWERS.get(known) if clip is None else read_config(clip)
    if config is None:
        raise ValueError(
            f"the text tower of {str(folder)!r} is that of clip_weight {weight!r}, which is no folder in it and not "
            f"known; pass its folder with --clip"
        )
    family = "siglip" if siglip else "clip"
    if config.get("model_type") != family:
        raise ValueError(
            f"{str(source)!r} must be a model of type {family!r} to match vision_config, got "
            f"{config.get('model_type')!r}; pass its folder with --clip"
        )
    with describing(Path(source, "config.json")):
        if siglip:  # which needs no ids, and by default has some outside of its vocabulary
            ids = {"bos_token_id": None, "eos_token_id": None}
            return SiglipTextConfig.from_dict({**ids, **(config.get("text_config") or {})}), None
        clip_config = CLIPConfig.from_dict(config)
        return clip_config.text_config, clip_config.projection_dim


def _one_of(numbers: range) -> str:
    return f"({'|'.join(map(str, numbers))})"


__all__ = [
    "KEPT_POSITIONS",
    "LOGIT_SCALE",
    "POSITION",
    "POSITION_TAIL",
    "POSITION_WEIGHT",
    "by_name",
    "clip_folder",
    "describing",
    "fold_positions",
    "is_original",
    "read_config",
    "rename",
    "translate_config",
    "unused_keys",
]
