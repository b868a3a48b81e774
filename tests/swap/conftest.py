"""The processors of other video LLMs need torchvision, which PyPI has for CUDA only: beside a PyTorch for CPUs it loads
once its two compiled ops are declared, which nothing here calls."""

import importlib.metadata
import importlib.util

import torch

WITHOUT = importlib.util.find_spec("torchvision") is None
if not WITHOUT and torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
    _ops = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _ops.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

collect_ignore_glob = ["test_*.py"] if WITHOUT else []


def pytest_report_header(config):
    import transformers

    where = "left out, torchvision is not installed; `make test` runs them" if WITHOUT else "with torchvision"
    return f"tests/swap: transformers {transformers.__version__}, {where}"
