"""A batch of no video gives an empty tensor, as AvgPool3d does, and gradients flow."""

import re

import pytest
import torch
from cases import OPS, Case, make_inputs, make_projector_inputs
from truth import run

import ppllava_kernels
from ppllava_kernels import PromptGuidedPool3d, PromptGuidedProjector, WeightedPool3d, prompt_guided_pool3d

KERNEL, ADAPTIVE = dict(kernel_size=(2, 3, 3)), dict(output_size=(2, 7, 1))
DENSE = {
    "kernel": (Case((0, 4, 6, 6), (5, 8), KERNEL), (0, 2, 2, 2)),
    "adaptive": (Case((0, 4, 6, 6), (5, 8), ADAPTIVE), (0, 2, 7, 1)),
}
PACKED = {
    "packed_kernel": (Case((0, 6, 6), (5, 8), KERNEL, cu_frames=(0,)), (0, 2, 2)),
    "packed_adaptive": (Case((0, 6, 6), (5, 8), ADAPTIVE, cu_frames=(0,)), (0, 2, 7, 1)),
}


def inputs_of(op, case):
    return (make_projector_inputs if op.endswith("project") else make_inputs)(case)


@pytest.mark.parametrize("case", DENSE | PACKED)
@pytest.mark.parametrize("op", OPS)
def test_every_op(op, case, backend):
    case, pooled = (DENSE | PACKED)[case]
    inputs = {k: x.to(torch.get_default_device()) for k, x in inputs_of(op, case).items()}
    results = run(op, case, inputs, backend)
    shape = case.size if op == "prompt_relevance" else (*pooled, 8)
    assert results["output"].shape == shape
    for name in OPS[op]:
        grad = results[f"grad of {name}"]
        assert grad.shape == inputs[name].shape
        assert grad.dtype == inputs[name].dtype
        assert not grad.any(), name
    assert results.get("relevance", torch.empty(case.size)).shape == case.size


@pytest.mark.parametrize("op", ["weighted_pool3d", "weighted_project"])
def test_without_weights(op, backend):
    case, pooled = DENSE["kernel"]
    inputs = {k: x.to(torch.get_default_device()) for k, x in inputs_of(op, case).items()} | dict(weights=None)
    assert run(op, case, inputs, backend)["output"].shape == (*pooled, 8)


def test_as_avg_pool3d(backend):
    values = torch.randn(0, 4, 6, 6, 8)
    expected = torch.nn.AvgPool3d((2, 3, 3))(values.movedim(-1, 1)).movedim(1, -1)
    assert WeightedPool3d((2, 3, 3), backend=backend)(values).shape == expected.shape


def test_modules(backend):
    values, image, text = torch.randn(0, 4, 6, 6, 8), torch.randn(0, 4, 6, 6, 5), torch.randn(0, 5)
    assert PromptGuidedPool3d((2, 3, 3), backend=backend)(values, image, text).shape == (0, 2, 2, 2, 8)
    layers = torch.nn.Linear(8, 12), torch.nn.Linear(12, 9)
    module = PromptGuidedProjector(
        torch.nn.LayerNorm(8), torch.nn.Linear(8, 5, bias=False), *layers, (2, 3, 3), backend=backend
    )
    tokens = module(values, text)
    assert tokens.shape == (0, 2, 2, 2, 9)
    tokens.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in module.parameters())


@pytest.mark.parametrize("case", [*DENSE, "packed_adaptive"])
def test_compiled(case):
    case, pooled = (DENSE | PACKED)[case]
    cu_frames = None if case.cu_frames is None else torch.tensor(case.cu_frames, dtype=torch.int32)
    inputs = {k: x.requires_grad_() for k, x in make_inputs(case).items() if k != "weights"}
    torch._dynamo.reset()
    function = torch.compile(prompt_guided_pool3d, fullgraph=True, backend="aot_eager")
    tokens = function(**inputs, **case.window, cu_frames=cu_frames, backend="cpp")
    assert tokens.shape == (*pooled, 8)
    tokens.sum().backward()
    assert not inputs["logit_scale"].grad.any()


@pytest.mark.parametrize(("size", "cu_frames"), [((2, 4, 6, 6), None), ((6, 6, 6), (0, 2, 6))], ids=["dense", "packed"])
@pytest.mark.parametrize("axis", [1, 2, -1])
def test_only_the_batch_may_be_empty(axis, size, cu_frames, backend):
    shape = [*size, 8]
    shape[axis] = 0
    lead = "B, T, H, W, D] of which only B" if cu_frames is None else "F, H, W, D] of which only F"
    hint = "pass at least one channel D" if axis == -1 else "leave out videos without patches"
    message = f"values must be [{lead} may be 0, got shape {shape}; {hint}"
    cu_frames = None if cu_frames is None else torch.tensor(cu_frames, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ppllava_kernels.weighted_pool3d(torch.randn(shape), None, **KERNEL, cu_frames=cu_frames, backend=backend)


@pytest.mark.parametrize("window", [dict(kernel_size=(5, 3, 3)), dict(kernel_size=(2, 7, 3))])
def test_a_kernel_that_would_not_fit(window, backend):
    with pytest.raises(ValueError, match="kernel_size must fit into the clip"):
        ppllava_kernels.weighted_pool3d(torch.randn(0, 4, 6, 6, 8), None, **window, backend=backend)


def test_a_video_without_frames_is_refused(backend):
    message = "cu_frames must give every video a frame, got none for video 0; leave that video out"
    cu_frames = torch.tensor([0, 0], dtype=torch.int32)
    values = torch.randn(0, 6, 6, 8)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ppllava_kernels.weighted_pool3d(values, None, **KERNEL, cu_frames=cu_frames, backend=backend)


def test_one_prompt_for_no_video():
    with pytest.raises(ValueError, match=r"^text_embeds must be \[B, C\] with B = 0 videos, got B = 1"):
        ppllava_kernels.prompt_relevance(torch.randn(0, 4, 6, 6, 5), torch.randn(1, 5))
