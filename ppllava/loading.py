"""Loading that leaves no weight to chance."""

from __future__ import annotations

import os
from pathlib import Path

from .weights import finite, first_of, read_weights


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
        place = pretrained_model_name_or_path
        options = {"ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
        try:
            model, info = super().from_pretrained(place, *model_args, **options)
        except Exception:
            if place is not None and os.path.isdir(place):
                read_weights(Path(place), required=False)  # names the file that is broken, if it is one
            raise
        mismatched = () if ignore_mismatched_sizes else info["mismatched_keys"]
        shapes = [f"{name} {list(got)} instead of {list(expected)}" for name, got, expected in mismatched]
        found = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mis-shaped": shapes}
        if wrong := "; ".join(f"{len(keys)} {kind}: {first_of(keys)}" for kind, keys in found.items() if keys):
            remedy = ", or pass ignore_mismatched_sizes=True to make the mis-shaped ones random" if shapes else ""
            raise ValueError(
                f"the weights in {str(place)!r} must be exactly those of {cls.__name__} with "
                f"its config.json, got {wrong}; load a folder as save_pretrained wrote it{remedy}"
            )
        spoilt = [name for name, x in model.named_parameters() if not finite(x)]
        if spoilt:
            raise ValueError(
                f"the weights in {str(place)!r} must be finite numbers, got NaN or infinity in "
                f"{len(spoilt)}: {first_of(spoilt)}; download or convert them again"
            )
        return (model, info) if output_loading_info else model


__all__ = ["StrictLoading"]
