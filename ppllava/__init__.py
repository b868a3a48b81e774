"""PPLLaVA on transformers; importing it registers the model with the Auto classes.

Nothing heavy is imported before it is used: `ppllava.video` reads files where neither torch nor transformers is.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import auto, versions
from .quiet_imports import hushed

if TYPE_CHECKING:
    from ppllava_kernels import __version__

    from .batching import BatchWarning, batch
    from .configuration_ppllava import PPLlavaConfig
    from .encoding import EncodedVideo, encode_video
    from .modeling_ppllava import PPLlavaForConditionalGeneration, PPLlavaModel
    from .processing_ppllava import PPLlavaProcessor
    from .stretch import stretch_position_embedding, stretch_text_model
    from .swap import compress
    from .visual_features import PPLlavaVisualFeatures

__all__ = [
    "BatchWarning",
    "EncodedVideo",
    "PPLlavaConfig",
    "PPLlavaForConditionalGeneration",
    "PPLlavaModel",
    "PPLlavaProcessor",
    "PPLlavaVisualFeatures",
    "__version__",
    "batch",
    "compress",
    "encode_video",
    "stretch_position_embedding",
    "stretch_text_model",
]

# name -> the module that has it
_HOMES = {
    "BatchWarning": "ppllava.batching",
    "EncodedVideo": "ppllava.encoding",
    "PPLlavaConfig": "ppllava.configuration_ppllava",
    "PPLlavaForConditionalGeneration": "ppllava.modeling_ppllava",
    "PPLlavaModel": "ppllava.modeling_ppllava",
    "PPLlavaProcessor": "ppllava.processing_ppllava",
    "PPLlavaVisualFeatures": "ppllava.visual_features",
    "__version__": "ppllava_kernels",
    "batch": "ppllava.batching",
    "compress": "ppllava.swap",
    "encode_video": "ppllava.encoding",
    "stretch_position_embedding": "ppllava.stretch",
    "stretch_text_model": "ppllava.stretch",
}
# modules with a face of their own, so that `ppllava.video.read_video` needs no import of `ppllava.video`
_MODULES = ("presets", "quantization", "relevance", "sampling", "video")


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"ppllava.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with hushed():
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


auto.register_when_imported()
versions.warn_of_untested()
