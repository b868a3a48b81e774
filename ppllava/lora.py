"""LoRA adapters in checkpoints of the original and of PEFT, merged into the weights that they adapt."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import original
from .weights import Weights, finite, first_of, put, read_files, read_json, weight_files


def split_adapter(weights: Weights, expected: dict[str, Tensor]) -> tuple[Weights, Weights]:
    """(weights, LoRA by "MODULE.lora_A.weight"), without the wrappers of PEFT in their names.

    Raises:
        ValueError: for two keys of one weight.
    """
    plain: Weights = {}
    lora: Weights = {}
    for key, weight in weights.items():
        name = key.removeprefix("base_model.model.")
        name = re.sub(r"^((?:model\.)?language_model\.)base_model\.model\.", r"\1", name).replace(".base_layer.", ".")
        if ".lora_" in name:
            module, _, rest = name.partition(".lora_")
            options = (original.rename(module), f"model.language_model.{module}")
            module = next((option for option in options if f"{option}.weight" in expected), module)
            put(lora, f"{module}.lora_{rest.replace('.default', '', 1)}", weight)
        else:
            put(plain, name, weight)
    return plain, lora


def find_adapter(
    source: Path, adapter: Path | None, lora: Weights, expected: dict[str, Tensor]
) -> tuple[Path | None, Weights]:
    """(folder of adapter_config.json, LoRA weights) of the source and the folder given for it."""
    for folder in dict.fromkeys((adapter, source)):
        if folder is None or not (files := weight_files(folder, sorted(os.listdir(folder)), "adapter_model")):
            continue
        if lora:
            raise ValueError(
                f"there must be one LoRA adapter, got one in {str(source)!r} and {str(files[0])!r}; remove one"
            )
        plain, lora = split_adapter(read_files(files), expected)
        if plain:
            raise ValueError(
                f"{str(files[0])!r} must hold LoRA weights only, got {len(plain)} others: {first_of(plain)}; merge the "
                "adapter with PEFT"
            )
    if not lora:
        if adapter is not None:
            raise FileNotFoundError(f"{str(adapter)!r} must hold adapter_model.safetensors, got none; pass its folder")
        return None, {}
    wrong = [weight.key for name, weight in lora.items() if f"{name.partition('.lora_')[0]}.weight" not in expected]
    if wrong:
        raise ValueError(
            f"LoRA weights must be those of layers of the model, got {len(wrong)} others: {first_of(wrong)} in "
            f"{str(lora[next(iter(lora))].file)!r}; pass the adapter of this model"
        )
    for folder in (adapter, source):
        if folder is not None and (folder / "adapter_config.json").exists():
            return folder, lora
    raise FileNotFoundError(
        f"the LoRA weights in {str(source)!r} need an adapter_config.json, got none; write one with "
        '"peft_type": "LORA", "r" and "lora_alpha", which the training configuration has, and pass its folder with '
        "--adapter"
    )


def merge_adapter(
    model: PreTrainedModel,
    weights: Weights,
    lora: Weights,
    folder: Path,
    dtype: torch.dtype | None,
) -> list[str]:
    """Replace each weight W by W + scale * B A, with PEFT; the names of the modules.

    Raises:
        ImportError: without PEFT.
        ValueError: for an adapter_config.json that is not that of the weights, or numbers that are not finite.
    """
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError:
        raise ImportError(f"merging the LoRA adapter in {str(folder)!r} needs peft; pip install peft") from None
    modules = sorted({name.partition(".lora_")[0] for name in lora})
    file = folder / "adapter_config.json"
    _check_ranks(file, _check_settings(file), lora)
    targets = {f"{module}.weight": weights[f"{module}.weight"].tensor for module in modules}
    # Copies, for PEFT adds in place.
    state = {name: tensor.to(dtype or tensor.dtype, copy=True) for name, tensor in targets.items()}
    model.load_state_dict(state, strict=False, assign=True)
    try:
        settings = LoraConfig.from_pretrained(str(folder))
        settings.target_modules, settings.exclude_modules, settings.modules_to_save = modules, None, None
        settings.layers_to_transform, settings.layers_pattern, settings.task_type = None, None, None
        settings.init_lora_weights, settings.inference_mode, settings.megatron_config = True, False, None
        settings.rank_pattern = _renamed(settings.rank_pattern, lora)
        settings.alpha_pattern = _renamed(settings.alpha_pattern, lora)
        wrapped = get_peft_model(model, settings)
        loaded = set_peft_model_state_dict(wrapped, {f"base_model.model.{name}": x.tensor for name, x in lora.items()})
        wrong = [name for name in (*loaded.missing_keys, *loaded.unexpected_keys) if ".lora_" in name]
    except Exception as error:  # PEFT checks little; of shapes, the first line is not about them
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        wrong = lines[1:] if isinstance(error, RuntimeError) and lines[1:] else lines[:1]
    if wrong:
        raise ValueError(
            f"{str(file)!r} must describe the LoRA weights that came with it, got others: {first_of(wrong)}; pass the "
            "two that belong together"
        )
    merged = wrapped.merge_and_unload()
    for name in targets:
        weights[name] = weights[name]._replace(tensor=merged.get_parameter(name).data)
    if spoilt := [name for name in targets if not finite(weights[name].tensor)]:
        raise ValueError(
            f"LoRA weights must be finite numbers, got NaN or infinity in {len(spoilt)} merged: {first_of(spoilt)}; "
            "save the adapter again"
        )
    return modules


def check_adapter(folder: Path) -> None:
    """Look at an adapter before PEFT reads it.

    Raises:
        FileNotFoundError: if it has no weights.
        ValueError: for files that cannot be read or are not plain tensors, and for ranks that are not its weights'.
    """
    file = folder / "adapter_config.json"
    settings = read_json(file)
    weights = read_files(weight_files(folder, sorted(os.listdir(folder)), "adapter_model"))
    if not weights:
        raise FileNotFoundError(
            f"{str(folder)!r} must hold adapter_model.safetensors beside adapter_config.json, got none; add it, or "
            "remove that file to load the model alone"
        )
    _check_ranks(file, settings, weights)


def _check_ranks(file: Path, settings: dict[str, Any], weights: Weights) -> None:
    """PEFT makes tensors of the ranks that the settings name before it compares them with the weights."""
    most = max((max(weight.tensor.shape, default=0) for weight in weights.values()), default=0)
    patterns = settings.get("rank_pattern")
    for name, rank in {"r": settings.get("r"), **(patterns if isinstance(patterns, dict) else {})}.items():
        if isinstance(rank, (int, float)) and not rank <= most:
            raise ValueError(
                f"{str(file)!r} must have ranks of at most {most}, the longest side of its weights, got {rank} for "
                f"{name}; pass the two that belong together"
            )


def _check_settings(file: Path) -> dict[str, Any]:
    settings = read_json(file)
    if (kind := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{str(file)!r} must have peft_type 'LORA', got {kind!r}; no other adapter can be merged")
    for name, types in (("r", int), ("lora_alpha", (int, float))):
        value = settings.get(name)
        if not isinstance(value, types) or isinstance(value, bool) or not value > 0:
            raise ValueError(
                f"{str(file)!r} must have {name} as a positive number, got {value!r}; use that of the training "
                "configuration"
            )
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(name) or ():
            if (
                not isinstance(pattern, str)
                or re.search(r"[)}*+?]\s*[*+{]", pattern)
                or len(_REPEATS.findall(pattern)) > 4
            ):
                raise ValueError(
                    f"{str(file)!r} must have names of layers or simple patterns in {name}, got {pattern!r}; write it "
                    "without repeated groups"
                )
    return settings


_REPEATS = re.compile(r"[*+{]")  # each of which multiplies the time that a match may take


def _renamed(patterns: dict[str, float] | None, lora: Weights) -> dict[str, float]:
    """rank_pattern or alpha_pattern, whose keys are about names in the model that PEFT wrapped, for our names."""
    renamed = {}
    for name, weight in lora.items():
        module, theirs = name.partition(".lora_")[0], weight.key.partition(".lora_")[0]
        theirs = theirs.rpartition("base_model.model.")[2]
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", theirs):  # as in PEFT, where the first one counts
                renamed[f"^{re.escape(module)}"] = value
                break
    return renamed


__all__ = ["check_adapter", "find_adapter", "merge_adapter", "split_adapter"]
