"""Prompt-guided compression of video tokens: relevance scoring, softmax weighting and 3D pooling as fused ops."""

from . import layers as layers
from .backends import compatible_backends, why_not
from .functional import (
    prompt_guided_pool3d,
    prompt_guided_project,
    prompt_relevance,
    weighted_pool3d,
    weighted_project,
)
from .modules import PromptGuidedPool3d, PromptGuidedProjector, WeightedPool3d
from .shapes import pooled_size

__version__ = "0.1.0"
__all__ = [
    "PromptGuidedPool3d",
    "PromptGuidedProjector",
    "WeightedPool3d",
    "compatible_backends",
    "pooled_size",
    "prompt_guided_pool3d",
    "prompt_guided_project",
    "prompt_relevance",
    "weighted_pool3d",
    "weighted_project",
    "why_not",
]
