"""The compression in the video LLMs of transformers: `ppllava.compress`."""

from .compress import FAMILIES, compress

__all__ = ["FAMILIES", "compress"]
