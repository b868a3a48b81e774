"""The Triton kernels, one file per op; `backend.py` is the backend."""
