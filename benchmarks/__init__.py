"""Benchmarks: `python -m benchmarks.kernels`, then `python -m benchmarks.table` writes the numbers into the docs."""
