"""Loading that leaves no weight to chance."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor


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

        A folder of the original implementation loads directly, where its weights are complete; `ppllava convert` makes
        one self-describing folder of it, and of partial ones.

        Args: as in transformers; `ignore_mismatched_sizes=True` makes parameters of another shape random ones.

        Raises:
            ValueError: where the weights are not exactly those of the model, or not numbers; the message names them.
        """
        # True, or transformers would raise before the missing and unexpected keys are known.
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
        shapes = [f"{name} {list(got)} instead of {list(expected)}" for name, got, expected in mismatched]
        found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": shapes}
        if wrong := "; ".join(f"{len(keys)} {kind}: {_first(keys)}" for kind, keys in found.items() if keys):
            remedy = ", or pass ignore_mismatched_sizes=True to make the mis-shaped ones random" if shapes else ""
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} must be exactly those of {cls.__name__} with "
                f"its config.json, got {wrong}; load a folder as save_pretrained wrote it{remedy}"
            )
        # A sum is not finite where one of its terms is not, and needs no memory.
        spoilt = [name for name, p in model.named_parameters() if p.is_floating_point() and not _finite(p)]
        if spoilt:
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} must be finite numbers, got NaN or infinity in "
                f"{len(spoilt)}: {_first(spoilt)}; download or convert them again"
            )
        return (model, info) if output_loading_info else model


def _first(keys: Iterable[str], limit: int = 10) -> str:
    """The first keys in order, and how many more there are."""
    names = sorted(keys)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _finite(parameter: Tensor) -> bool:
    return parameter.is_meta or bool(parameter.detach().sum(dtype=torch.float32).isfinite())


__all__ = ["StrictLoading"]
