"""fp8 for the vision tower and the language model, through torchao."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from .modeling_ppllava import PPLlavaPreTrainedModel
from .quiet_imports import hushed

if TYPE_CHECKING:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig

Model = TypeVar("Model", bound=PPLlavaPreTrainedModel)
CAPABILITY = (8, 9)  # the first with fp8 matrix products
LEAST = 1e-12  # max|row of x| is taken to be no less
MULTIPLE = 16  # of both sides of a weight, for those products; torchao leaves others as they are without a word


def fp8(model: Model) -> Model:
    """The same model, with the linear layers of vision tower and language model in fp8, for inference.

        y = (q(x) q(W)^T) * (s_x s_W^T) + b,    q(z) = z / s_z rounded to e4m3,    s_z = max|row of z| / 448

    for x [..., I] and W [O, I]; of W once, here, and of x in each call. A row of zeros gives zeros. All else stays in
    bfloat16: the head, the embeddings, the projector, whose op reads its weights, and the guide.

    Raises:
        RuntimeError: where fp8 cannot run (:func:`why_not_fp8`).
        ValueError: for a model whose layers cannot be in fp8 (:func:`fp8_linears`).
    """
    if why := why_not_fp8(model.device):
        raise RuntimeError(why)
    chosen = set(fp8_linears(model).values())
    _torchao().quantize_(model, fp8_config(), filter_fn=lambda module, name: module in chosen)
    for module in chosen:
        weight = module.weight
        zeros = weight.scale == 0  # [O, 1], of rows that torchao made 0 / 0
        weight.qdata.view(torch.uint8).masked_fill_(zeros, 0)
        weight.scale.masked_fill_(zeros, 1)
    return model


def why_not_fp8(device: torch.device | str) -> str | None:
    """None, or the one sentence why fp8 cannot run on this device."""
    if importlib.util.find_spec("torchao") is None:
        remedy = 'in the folder of the sources, pip install --no-build-isolation ".[fp8]"'
        return f"fp8 needs torchao, which is not installed; {remedy}"
    device, what = torch.device(device), f"a CUDA GPU of compute capability {'.'.join(map(str, CAPABILITY))} or newer"
    if device.type != "cuda":
        return f"fp8 needs the model on {what}, got it on {device}; move it there, or leave it in bfloat16"
    if not torch.cuda.is_available() or torch.version.hip:
        got = "a ROCm GPU" if torch.version.hip else "none that PyTorch can use"
        return f"fp8 needs {what}, got {got}; leave the model in bfloat16"
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        got = f"{torch.cuda.get_device_name(device)} of {'.'.join(map(str, capability))}"
        return f"fp8 needs {what}, got {got}; leave the model in bfloat16"
    return None


def _torchao() -> ModuleType:
    """`torchao.quantization`, without its warning for each library of a GPU that this machine cannot load."""
    with hushed():
        return importlib.import_module("torchao.quantization")


def fp8_config() -> Float8DynamicActivationFloat8WeightConfig:
    """What :func:`fp8` gives to torchao; of inductor's settings, which are the process's, it changes none."""
    torchao = _torchao()
    return torchao.Float8DynamicActivationFloat8WeightConfig(
        granularity=torchao.PerRow(),
        activation_value_lb=LEAST,  # a row of zeros, as that of a padding token, would become 0 / 0
        set_inductor_config=False,
    )


def fp8_linears(model: PPLlavaPreTrainedModel) -> dict[str, nn.Linear]:
    """Name -> layer of all that :func:`fp8` changes.

    Raises:
        ValueError: where one is not in bfloat16, has a side that is no multiple of 16 or is quantised already, or where
            vision tower or language model have none.
    """
    inner = model.base_model
    head, found = inner.language_model.get_output_embeddings(), {}
    for part in (inner.vision_tower, inner.language_model):
        modules = {module for module in part.modules() if isinstance(module, nn.Linear) and module is not head}
        if not modules:
            raise ValueError(
                f"fp8 is for layers of type nn.Linear, got {type(part).__name__} without any; leave it in bfloat16"
            )
        found |= {name: module for name, module in model.named_modules() if module in modules}
    for name, module in found.items():
        weight = module.weight
        if type(weight) is not nn.Parameter:
            raise ValueError(
                f"model must not be quantised already, got {name}.weight of type {type(weight).__name__}; "
                "call fp8 once, on a model in bfloat16"
            )
        if weight.dtype != torch.bfloat16:
            raise ValueError(
                f"model must be in bfloat16, got {name}.weight in {str(weight.dtype).removeprefix('torch.')}; "
                "load it with dtype=torch.bfloat16"
            )
        if any(size % MULTIPLE for size in weight.shape):
            raise ValueError(
                f"weights must have sides that are multiples of {MULTIPLE} for fp8, got {name}.weight of "
                f"{list(weight.shape)}; leave the model in bfloat16"
            )
    return found


__all__ = ["fp8", "fp8_config", "fp8_linears", "why_not_fp8"]
