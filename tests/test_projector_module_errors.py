"""Every wrong argument of PromptGuidedProjector: what it raises, word for word."""

import re

import pytest
import torch
from test_projector import C, D, V, build, inputs, subclass
from torch import nn

ERRORS = {
    "linear": (
        dict(linear_1=torch.ones(3, 3)),
        TypeError,
        "linear_1 must be a module, got Tensor; pass the nn.Linear of the model",
    ),
    "no_linear": (
        dict(linear_2=None),
        TypeError,
        "linear_2 must be a module, got NoneType; pass the nn.Linear of the model",
    ),
    "norm": (
        dict(norm=nn.functional.layer_norm),
        TypeError,
        "norm must be None or a module, got function; pass the nn.LayerNorm of the model",
    ),
    "norm_without_guide": (
        dict(guide=None, return_relevance=False),
        ValueError,
        "norm must be None where guide is, got LayerNorm; pass the guide's projection",
    ),
    "relevance_without_guide": (
        dict(norm=None, guide=None),
        ValueError,
        "return_relevance must be False without guide, got True; a plain mean has no relevance",
    ),
    "linear_2": (
        dict(linear_2=nn.Linear(20, D)),
        ValueError,
        "linear_2 must be [D, D'] with D' = 24 to follow linear_1 [24, 12], got [16, 20]; pass the two layers of one "
        "projector",
    ),
    "guide": (
        dict(guide=nn.Linear(20, C)),
        ValueError,
        "guide must be [C, V] with V = 12 to take what linear_1 [24, 12] takes, got [10, 20]; use guide and projector "
        "of one vision tower",
    ),
    "norm_width": (
        dict(norm=nn.LayerNorm((6, V))),
        ValueError,
        "norm must be over [V] = [12] to precede guide [10, 12], got [6, 12]; pass the layer norm that comes before "
        "the projection",
    ),
    "window": (
        dict(kernel_size=None),
        ValueError,
        "exactly one of kernel_size and output_size must be given, got neither; pass one of them",
    ),
    "temperature": (
        dict(temperature=0.0),
        ValueError,
        "temperature must be positive and finite in float32, got 0.0; the original model uses 0.01",
    ),
    "logit_scale": (
        dict(logit_scale="100"),
        TypeError,
        "logit_scale must be a float or a tensor, got str; pass exp(logit_scale)",
    ),
    "backend": (
        dict(backend="cudnn"),
        ValueError,
        "backend must be None or one of cuda, cpp, triton, reference, got 'cudnn'; None takes the best",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_when_it_is_made(name):
    changes, error, message = ERRORS[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        build(**changes)


@pytest.mark.parametrize("changed", [False, True])
def test_errors_of_text_embeds(changed):
    features, text = inputs()
    projector, mean = build(), build(norm=None, guide=None, return_relevance=False)
    if changed:
        subclass(projector, "linear_1")
    message = "text_embeds must be given, got None; a guide and one prompt per video go together"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        projector(features)
    message = "text_embeds must be None for a projector without guide, got shape [2, 10]; a guide and one prompt per "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}video go together$"):
        mean(features, text)
    with pytest.raises(ValueError, match=r"^text_embeds must be \[B, C\] with B = 2 videos, got B = 1; "):
        projector(features, text[:1])


CHANGED = {
    None: "norm_weight must be [V] with the V of features [2, 4, 6, 6, 11], got [12]; ",
    "norm": "features must have the V = 12 channels that guide takes, got [2, 4, 6, 6, 11]; ",
    "guide": "features must have the V = 12 channels that guide takes, got [2, 4, 6, 6, 11]; ",
    "linear_1": "features must have the V = 12 channels that guide takes, got [2, 4, 6, 6, 11]; ",
}


@pytest.mark.parametrize("changed", CHANGED)
def test_errors_of_features(changed):
    """In one sentence also where a module is called as it is."""
    features, text = inputs()
    narrow = features[..., 1:].contiguous()
    projector, mean = build(), build(norm=None, guide=None, return_relevance=False)
    if changed:
        subclass(projector, changed)

    def rejected(error, message, *arguments, projector=projector):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            projector(*arguments)

    rejected(TypeError, "features must be a tensor, got list; wrap it with torch.as_tensor", [1.0], text)
    rejected(ValueError, "features must be [B, T, H, W, V], got shape [4, 6, 6, 12]; ", features[0], text)
    rejected(ValueError, CHANGED[changed], narrow, text)
    message = "linear_1_weight must be [D', V] with V = 11 to follow features [2, 4, 6, 6, 11], got [24, 12]; "
    if changed == "linear_1":
        subclass(mean, changed)
        message = "features must have the V = 12 channels that linear_1 takes, got [2, 4, 6, 6, 11]; "
    rejected(ValueError, message, narrow, projector=mean)
