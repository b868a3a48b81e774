"""Benchmarks: `python -m benchmarks.kernels`, then `python -m benchmarks.table` writes the numbers into the docs."""

import logging
import warnings

# transformers imports torchao where it is installed, which warns of each of its GPU libraries that a CPU lacks.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
# Of transformers' own video LLMs about its own decoder, once for each.
warnings.filterwarnings("ignore", "Both `past_key_values` and `cache` are set", FutureWarning)
