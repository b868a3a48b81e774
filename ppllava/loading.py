"""Loading that leaves no weight to chance."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import torch

from . import original
from .compat import ConversionOps, WeightConverter, WeightRenaming, register_checkpoint_conversion_mapping
from .lora import check_adapter
from .weights import TRAINED, finite, first_of, indexed_files, loaded_files, read_files, read_json, weight_files


class StrictLoading:
    """For subclasses of transformers' `PreTrainedModel`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """As in transformers, but strict: a parameter that the weights lack would be random, and only be logged.

        A folder of the original implementation loads directly where its `model*` files hold all weights; `ppllava
        convert` makes one self-describing folder of it, and of partial ones.

        Args: as in transformers; `ignore_mismatched_sizes=True` makes parameters of another shape random ones.

        Raises:
            ValueError: where the weights are not exactly those of the model, or not numbers; the message names them.
        """
        # True, or transformers would raise before the missing and unexpected keys are known.
        place = pretrained_model_name_or_path
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
        folder = Path(place or "", kwargs.get("subfolder") or "")
        other = place is None or any(kwargs.get(name) for name in ("state_dict", "variant", "gguf_file"))
        for index in () if place is None else folder.glob("*.index*.json"):
            indexed_files(index)
        if not other:
            _check_keys(folder)
        model, info = super().from_pretrained(place, *model_args, **options)
        mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
        shapes = [f"{name} {list(got)} instead of {list(expected)}" for name, got, expected in mismatched]
        found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": shapes}
        if wrong := "; ".join(f"{len(keys)} {kind}: {first_of(keys)}" for kind, keys in found.items() if keys):
            remedy = ", or pass ignore_mismatched_sizes=True to make the mis-shaped ones random" if shapes else ""
            raise ValueError(
                f"the weights in {str(place)!r} must be exactly those of {cls.__name__} with "
                f"its config.json, got {wrong}; load a folder as save_pretrained wrote it{remedy}"
            )
        # Transformers unties weights that the files have with different numbers.
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        if untied := sorted(tied.keys() - model.all_tied_weights_keys.keys()):
            raise ValueError(
                f"{untied[0]} in {str(place)!r} must equal {tied[untied[0]]} where tie_word_embeddings is true, got "
                "other numbers; correct config.json"
            )
        spoilt = [name for name, x in model.named_parameters() if not finite(x)]
        if spoilt:
            raise ValueError(
                f"the weights in {str(place)!r} must be finite numbers, got NaN or infinity in "
                f"{len(spoilt)}: {first_of(spoilt)}; download or convert them again"
            )
        return (model, info) if output_loading_info else model

    def load_adapter(self, peft_model_id: str | os.PathLike | None = None, *args, **kwargs):
        """As in transformers, which also calls it for the adapter in the folder of a model.

        Raises:
            ValueError, FileNotFoundError: for an adapter that cannot be read, or is none of this model.
        """
        try:
            if peft_model_id is not None and Path(peft_model_id).is_dir():
                check_adapter(Path(peft_model_id))
            return super().load_adapter(peft_model_id, *args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError, ImportError):
            raise
        except Exception as error:  # PEFT checks little
            if isinstance(error, (ValueError, FileNotFoundError)) and "; " in str(error):  # which says what to do
                raise
            reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
            raise ValueError(
                f"the adapter in {str(peft_model_id)!r} must be one of this model, got {type(error).__name__}: "
                f"{reason}; save it again with PEFT, or remove adapter_config.json to load the model alone"
            ) from error


def _check_keys(folder: Path) -> None:
    """Raise a ValueError for what transformers would not see, or leave to the order of keys."""
    if (folder / "adapter_config.json").exists() and importlib.util.find_spec("peft") is None:
        raise ImportError(
            f"the adapter in {str(folder)!r} needs peft, which is missing; pip install peft, or remove "
            "adapter_config.json to load the model alone"
        )
    files = loaded_files(folder)
    weights = read_files(files)
    if (folder / "config.json").exists() and original.is_original(read_json(folder / "config.json")):
        names = sorted(os.listdir(folder))
        stems = (TRAINED, "adapter_model", "model")
        also = {file.name for stem in stems for file in weight_files(folder, names, stem)} - {x.name for x in files}
        also.update(key for key in weights if ".lora_" in key)
        if "adapter_config.json" in names:
            also.add("adapter_config.json")
        if also:
            raise ValueError(
                f"{str(folder)!r} must hold its weights in model.safetensors or pytorch_model.bin alone to be loaded "
                f"directly, got also {first_of(also)}; use ppllava convert, and load what it wrote"
            )
    if spare := original.by_name(weights)[1]:
        raise ValueError(
            f"the weights in {str(folder)!r} must have one position table or the original's two, got {spare[0]} beside "
            "those; remove it"
        )


# For transformers' from_pretrained. One way: save_pretrained writes the model's names, not those it was loaded from.


class _Rename(WeightRenaming):
    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "")


class _Convert(WeightConverter):
    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "")


class _FoldPositions(ConversionOps):
    def convert(self, input_dict: dict, source_patterns: list, target_patterns: list, full_layer_name: str, **kwargs):
        tail, table = (input_dict.get(pattern) for pattern in source_patterns)
        if not table or not tail:
            return {}  # the weight is missing
        guide = kwargs["config"].guide_config
        shape = (guide.max_position_embeddings, guide.hidden_size)
        return {full_layer_name: original.fold_positions(table[0], tail[0], shape)}


class _Scalar(ConversionOps):
    def convert(self, input_dict: dict, source_patterns: list, target_patterns: list, full_layer_name: str, **kwargs):
        (scale,) = input_dict.values()
        return {full_layer_name: scale[0].reshape(()) if scale[0].numel() == 1 else scale[0]}


# By class and not by model type: for model types that have a mapping, PEFT renames the weights of adapters, too.
for _name in ("PPLlavaForConditionalGeneration", "PPLlavaModel"):
    register_checkpoint_conversion_mapping(
        _name,
        [
            *(_Rename(pattern, name) for pattern, name in original.RENAMES),
            # Transformers renames "model.language_model.model" for models of its own; without the first "model", which
            # it adds itself, it does not.
            _Rename(r"^model\.language_model\.", "language_model."),
            _Convert(
                [rf"^{re.escape(name)}$" for name in (original.POSITION_TAIL, original.POSITION)],
                original.POSITION_WEIGHT,
                [_FoldPositions()],
            ),
            _Convert(r"^multi_modal_projector\.logit_scale$", original.LOGIT_SCALE, [_Scalar()]),
        ],
        overwrite=True,
    )

__all__ = ["StrictLoading"]
