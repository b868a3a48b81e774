"""Benchmarks: `python -m benchmarks.kernels`, then `python -m benchmarks.table` writes the numbers into the docs."""

import warnings

from ppllava.quiet_imports import hush

hush()
# Of transformers' own video LLMs about its own decoder, once for each.
warnings.filterwarnings("ignore", "Both `past_key_values` and `cache` are set", FutureWarning)
