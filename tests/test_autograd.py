"""What gradients the ops have, and the sentence for those that they do not have."""

import pytest
import torch
from cases import CASES, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from ppllava_kernels import prompt_guided_pool3d, weighted_pool3d

CASE = CASES["divisible"]


@pytest.mark.parametrize("op", [weighted_pool3d, prompt_guided_pool3d])
def test_double_backward(op, place):
    """Wrong second derivatives would be worse than none."""
    backend, device = place
    inputs = {k: v.to(device).requires_grad_() for k, v in make_inputs(CASE).items()}
    names = ("values", "weights") if op is weighted_pool3d else ("values", "image_embeds", "text_embeds")
    arguments = [inputs[name] for name in names]

    def penalty(backend):
        out = op(*arguments, backend=backend, **CASE.window).sum()
        (grad,) = torch.autograd.grad(out, arguments[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), arguments[1])[0]

    assert penalty("reference").abs().sum() > 0
    message = f"backend='{backend}' has no double backward; use backend='reference', which is plain PyTorch, for it"
    with pytest.raises(RuntimeError, match=message):
        penalty(backend)


def test_modes_see_the_ops():
    """Profilers, tracers and fake tensors sit below autograd: a call must reach them, in both directions."""

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            seen.append(str(function))
            return function(*arguments, **(kwargs or {}))

    seen = []
    inputs = {k: v.requires_grad_() for k, v in make_inputs(CASE).items() if k != "weights"}
    with Record():
        prompt_guided_pool3d(**inputs, backend="cpp", **CASE.window).sum().backward()
    assert [name for name in seen if "ppllava_kernels" in name] == [
        "ppllava_kernels.prompt_guided_pool3d.default",
        "ppllava_kernels.weighted_pool3d_backward.default",
        "ppllava_kernels.prompt_relevance_backward.default",
    ]


def test_only_the_relevance_is_used(place):
    """A loss on the relevance alone, as for its supervision, and one on the pooled tokens alone."""
    backend, device = place
    for loss in (lambda pooled, relevance: relevance.square().sum(), lambda pooled, relevance: pooled.square().sum()):
        grads = []
        for each in (backend, "reference"):
            inputs = {k: v.to(device).requires_grad_() for k, v in make_inputs(CASE).items() if k != "weights"}
            loss(*prompt_guided_pool3d(**inputs, return_relevance=True, backend=each, **CASE.window)).backward()
            grads.append([x.grad if x.grad is not None else torch.zeros_like(x) for x in inputs.values()])
        for actual, expected in zip(*grads):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_scratch_of_the_backward_follows_the_clips(place, monkeypatch):
    """One long clip among short ones: windows of the short ones get no scratch of the long one's size."""
    backend, device = place
    cu_frames = torch.tensor([0, 40, *range(41, 49)], dtype=torch.int32)  # 40 frames, then 8 clips of 1 frame
    values = torch.randn(48, 2, 2, 4, device=device, requires_grad=True)
    weights = torch.rand(48, 2, 2, device=device, requires_grad=True)
    pooled = weighted_pool3d(values, weights, output_size=(2, 1, 1), cu_frames=cu_frames, backend=backend)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    pooled.sum().backward()
    monkeypatch.undo()
    scratch = max(x.numel() for x in sizes if x.dim() == 1)
    assert scratch == 2 * 20 * 4 + 8 * 2 * 1 * 4


def test_inference_mode_and_no_grad(backend):
    inputs = {k: v.to(torch.get_default_device()) for k, v in make_inputs(CASE).items() if k != "weights"}
    expected = prompt_guided_pool3d(**inputs, backend=backend, **CASE.window)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(prompt_guided_pool3d(**inputs, backend=backend, **CASE.window), expected)
