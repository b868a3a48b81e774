"""Load each variant of the Kernel Hub folder with `kernels`, offline; ppllava_kernels may be installed beside it.

python tests/hub_smoke.py hub/ppllava-kernels
"""

import importlib.util
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn

WINDOW = dict(kernel_size=(2, 3, 3))
OPS = ("prompt_relevance", "weighted_pool3d", "prompt_guided_pool3d", "prompt_guided_project", "weighted_project")


def main(folder: Path) -> None:
    socket.socket.connect = None  # whoever looks for a network fails
    installed = importlib.util.find_spec("ppllava_kernels") is not None
    if installed:
        import ppllava_kernels
    names = sorted(path.name for path in (folder / "build").iterdir())
    compiled = next(name for name in names if not name.startswith("torch-"))
    loaded = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant, backends in (("torch-cpu", ["reference"]), (compiled, ["cpp", "reference"])):
            alone = only(folder, variant, Path(scratch) / variant)
            kernel = loaded[variant] = get_local_kernel(alone, backend="cpu" if variant == "torch-cpu" else None)
            assert Path(kernel.__file__).is_relative_to(alone), kernel.__file__
            check_ops(kernel, backends)
            check_export(kernel)
            check_layers(kernel, alone)
        # The whole folder: the compiled variant comes first, and a second copy of it is the same ops.
        kernel = get_local_kernel(folder)
        assert kernel.__name__ == loaded[compiled].__name__, (kernel.__name__, loaded[compiled].__name__)
        check_ops(kernel, ["cpp", "reference"])
        for variant, backends in (("torch-cpu", ["reference"]), (compiled, ["cpp", "reference"])):
            check_ops(loaded[variant], backends)  # still, with the other one there
    check_page(folder)
    # On the machine of a user with CUDA; here it stands for itself.
    loaded["torch-cuda"] = get_local_kernel(folder / "build" / "torch-cuda")
    check_ops(loaded["torch-cuda"], ["reference"])
    kernels = list(loaded.values())
    if installed:
        check_ops(ppllava_kernels, ["cpp", "reference"])
        assert check_export(ppllava_kernels) == "ppllava_kernels"  # the name in programs that were exported before
        kernels.append(ppllava_kernels)
    else:
        assert "ppllava_kernels" not in sys.modules
    namespaces = {sys.modules[f"{kernel.__name__}.library"].NAMESPACE for kernel in kernels}
    assert len(namespaces) == len(kernels), namespaces
    assert all(hasattr(getattr(torch.ops, namespace), "weighted_pool3d") for namespace in namespaces)
    beside = "beside the installed package" if installed else "without the package"
    print(f"hub smoke test passed {beside}:", *loaded)


def check_page(folder: Path) -> None:
    """The Python of docs/hub.md, as a reader pastes it in the checkout."""
    page, before, namespace = Path(__file__).parent.parent / "docs" / "hub.md", os.getcwd(), {}
    os.chdir(folder.parent.parent)  # where hub/ppllava-kernels is
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)
    os.chdir(before)


def only(folder: Path, variant: str, copy: Path) -> Path:
    shutil.copytree(folder / "build" / variant, copy / "build" / variant)
    return copy


def check_ops(kernel, backends: list[str]) -> None:
    """The backends of CPU tensors, and each op with its gradients in float64 against plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    shapes = dict(values=(1, 4, 6, 6, 32), image=(1, 4, 6, 6, 16), text=(1, 16), features=(1, 4, 6, 6, 24), norm=(24,))
    shapes |= dict(bias=(24,), guide=(16, 24), linear_1=(20, 24), bias_1=(20,), linear_2=(32, 20), bias_2=(32,))
    x = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    found = kernel.compatible_backends(x["values"])
    assert found == backends, found
    assert (kernel.why_not("cpp") is None) == ("cpp" in backends), kernel.why_not("cpp")
    for op in OPS:
        ours, plain = ({name: tensor.clone().requires_grad_() for name, tensor in x.items()} for _ in range(2))
        results = [of_kernel(kernel, op, ours), of_torch(op, plain)]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
        for result in results:
            result.square().sum().backward()
        used = [name for name, tensor in plain.items() if tensor.grad is not None]
        assert used, op
        for name in used:
            torch.testing.assert_close(ours[name].grad, plain[name].grad, rtol=1e-6, atol=1e-9, msg=f"{op}: {name}")


def of_kernel(kernel, op: str, x: dict) -> torch.Tensor:
    layers = dict(linear_1_weight=x["linear_1"], linear_1_bias=x["bias_1"])
    layers |= dict(linear_2_weight=x["linear_2"], linear_2_bias=x["bias_2"])
    guide = dict(norm_weight=x["norm"], norm_bias=x["bias"], norm_eps=1e-5, guide_weight=x["guide"])
    function = getattr(kernel, op)
    match op:
        case "prompt_relevance":
            return function(x["image"], x["text"])
        case "weighted_pool3d":
            return function(x["values"], x["image"][..., 0], temperature=0.5, **WINDOW)
        case "prompt_guided_pool3d":
            return function(x["values"], x["image"], x["text"], **WINDOW)
        case "prompt_guided_project":
            return function(x["features"], x["text"], **guide, **layers, **WINDOW)
        case "weighted_project":
            return function(x["features"], x["image"][..., 0], temperature=0.5, **layers, **WINDOW)


def of_torch(op: str, x: dict) -> torch.Tensor:
    match op:
        case "prompt_relevance":
            return relevance(x["image"], x["text"])
        case "weighted_pool3d":
            return pool(x["values"], x["image"][..., 0], 0.5)
        case "prompt_guided_pool3d":
            return pool(x["values"], relevance(x["image"], x["text"]), 0.01)
    # With the second layer after the pooling, or before it: the sum of the weights is 1.
    rows = F.linear(F.gelu(F.linear(x["features"], x["linear_1"], x["bias_1"])), x["linear_2"], x["bias_2"])
    if op == "weighted_project":
        return pool(rows, x["image"][..., 0], 0.5)
    image = F.linear(F.layer_norm(x["features"], (24,), x["norm"], x["bias"], 1e-5), x["guide"])
    return pool(rows, relevance(image, x["text"]), 0.01)


def relevance(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1)[0]  # [1, T, H, W]
    return (100 * cosines).flatten(1).softmax(1).view(cosines.shape)


def pool(values: torch.Tensor, weights: torch.Tensor, temperature: float) -> torch.Tensor:
    shape = (1, 2, 2, 2, 3, 2, 3)  # [B, To, 2, Ho, 3, Wo, 3]
    scores = (weights / temperature).view(shape).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # [1, To, Ho, Wo, 18]
    rows = values.view(*shape, -1).permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6)  # [1, To, Ho, Wo, 18, D]
    return (scores.softmax(-1).unsqueeze(-1) * rows).sum(-2)


def check_export(kernel) -> str | None:
    """Compiled and exported in one graph; the namespace of its op, or None for the reference, which has none."""
    module, values = kernel.WeightedPool3d(**WINDOW), torch.randn(1, 4, 6, 6, 32)
    expected = module(values)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(values), expected)
    program = torch.export.export(module, (values,))
    torch.testing.assert_close(program.module()(values), expected)
    targets = [str(node.target) for node in program.graph.nodes if "weighted_pool3d" in str(node.target)]
    return targets[0].partition(".")[0] if targets else None


@use_kernel_forward_from_hub("WeightedPool3d")
class PlainPool(nn.Module):
    """As a model has it that knows nothing of kernels."""

    kernel_size, stride, output_size, temperature = (2, 3, 3), None, None, 0.5

    def forward(self, values, weights=None, cu_frames=None):
        return pool(values, weights, self.temperature)


def check_layers(kernel, folder: Path) -> None:
    model = nn.Sequential(PlainPool())
    repository = LocalLayerRepository(folder, layer_name="WeightedPool3d")
    with use_kernel_mapping({"WeightedPool3d": {"cpu": repository}}, inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
    assert model[0].forward.__func__ is kernel.layers.WeightedPool3d.forward
    values, weights = torch.randn(1, 4, 6, 6, 8, dtype=torch.float64), torch.randn(1, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(model[0](values, weights), pool(values, weights, 0.5))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
