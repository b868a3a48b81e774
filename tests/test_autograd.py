"""What gradients the ops have, and the sentence for those that they do not have."""

import re

import pytest
import torch
from cases import CASES, DTYPES, OPS, Case, cu_frames_of, make_inputs, make_projector_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import ppllava_kernels
from ppllava_kernels import prompt_guided_pool3d, weighted_pool3d
from ppllava_kernels.backends import products

CASE = CASES["divisible"]
SMALL = Case((1, 2, 1, 2), (3, 2), dict(kernel_size=(1, 1, 2)))


def make(op, case=CASE, device="cpu", dtypes=DTYPES["fp32"]):
    """The inputs of an op, all of which ask for a gradient."""
    tensors = (make_projector_inputs if op.endswith("project") else make_inputs)(case, dtypes)
    return {name: tensors[name].to(device).requires_grad_() for name in OPS[op]}


def call(op, inputs, case=CASE, **options):
    options |= case.window | dict(norm_eps=1e-5) if op == "prompt_guided_project" else case.window
    return getattr(ppllava_kernels, op)(**inputs, cu_frames=cu_frames_of(case), **options)


@pytest.mark.parametrize("op", [op for op in OPS if op != "prompt_relevance"])
def test_double_backward(op, place):
    """Wrong second derivatives would be worse than none."""
    backend, device = place
    case = SMALL if op.endswith("project") else CASE
    inputs = make(op, case, device)
    first, second, *_ = inputs.values()

    def penalty(backend):
        out = call(op, inputs, case, backend=backend).sum()
        (grad,) = torch.autograd.grad(out, first, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), second)[0]

    assert penalty("reference").abs().sum() > 0
    message = f"backend='{backend}' has no double backward; use backend='reference', which is plain PyTorch, for it"
    with pytest.raises(RuntimeError, match=message):
        penalty(backend)


GRADCHECKED = {
    "dense": Case((2, 2, 2, 2), (3, 2), dict(kernel_size=(2, 1, 2), stride=1)),
    "adaptive": Case((1, 3, 1, 3), (3, 2), dict(output_size=(2, 1, 2))),
    "ragged": Case((5, 1, 2), (3, 2), dict(kernel_size=(2, 1, 2)), (0, 2, 5)),
    "ragged_adaptive": Case((5, 1, 2), (3, 2), dict(output_size=(2, 1, 1)), (0, 1, 5)),
}


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", GRADCHECKED)
@pytest.mark.parametrize("op", ["prompt_guided_project", "weighted_project"])
def test_gradcheck(op, case, backend, monkeypatch):
    """Against numerical differences, which know of no formula; tiles are smaller than a clip and than D'."""
    monkeypatch.setattr(products, "TILE", {"cpu": (2, 3)})
    case = GRADCHECKED[case]
    inputs = make(op, case, dtypes=DTYPES["fp64"])
    relevance = dict(return_relevance=True) if op == "prompt_guided_project" else {}

    def function(*tensors):
        return call(op, dict(zip(inputs, tensors)), case, temperature=0.3, backend=backend, **relevance)

    assert all(x.requires_grad for x in inputs.values())
    torch.autograd.gradcheck(function, tuple(inputs.values()), rtol=1e-5, atol=1e-7)


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
    seen.clear()
    inputs = make("prompt_guided_project")
    with Record():
        call("prompt_guided_project", inputs, backend="cpp").sum().backward()
    assert [name for name in seen if "ppllava_kernels" in name] == [
        "ppllava_kernels.guide_relevance.default",
        "ppllava_kernels.hidden_pool3d.default",
        "ppllava_kernels.hidden_pool3d_backward.default",
        "ppllava_kernels.guide_relevance_backward.default",
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


@pytest.mark.parametrize("op", ["weighted_pool3d", "weighted_project"])
def test_forward_mode_is_refused(op, place):
    """A tangent that got lost would be a derivative of zero."""
    backend, device = place
    inputs = {name: x.detach() for name, x in make(op, SMALL, device).items()}
    first = OPS[op][0]

    def derivative(backend):
        def run(x):
            return call(op, inputs | {first: x}, SMALL, backend=backend)

        return torch.func.jvp(run, (inputs[first],), (torch.ones_like(inputs[first]),))[1]

    why = f"backend='{backend}' has no forward-mode derivative; use backend='reference', which is plain PyTorch, for it"
    with pytest.raises(RuntimeError, match=f"^{re.escape(why)}$"):
        derivative(backend)
    assert derivative("reference").abs().max() > 0


def in_two(op, place):
    """The same function of two tensors on a backend and on the reference."""
    backend, device = place
    inputs = {name: x.detach() for name, x in make(op, SMALL, device).items()}
    names = OPS[op][:2]

    def on(backend):
        def run(*tensors):
            out = call(op, inputs | dict(zip(names, tensors)), SMALL, backend=backend, temperature=0.3)
            return out.square().sum()

        return run

    return on(backend), on("reference"), tuple(inputs[name] for name in names)


@pytest.mark.parametrize("op", ["weighted_pool3d", "prompt_guided_pool3d", "weighted_project"])
@pytest.mark.parametrize("transform", ["grad", "jacrev", "vmap", "vmap_of_grad", "grad_of_vmap"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(op, transform, place):
    function, reference, tensors = in_two(op, place)
    both = tuple(range(2))
    twice = tuple(torch.stack([x, 0.5 * x]) for x in tensors)
    transforms = {
        "grad": lambda f: torch.func.grad(f, both)(*tensors),
        "jacrev": lambda f: torch.func.jacrev(lambda *x: f(*x).view(1).expand(2) * 3, both)(*tensors),
        "vmap": lambda f: (torch.func.vmap(f)(*twice),),
        "vmap_of_grad": lambda f: torch.func.vmap(torch.func.grad(f, both))(*twice),
        "grad_of_vmap": lambda f: torch.func.grad(lambda *x: torch.func.vmap(f)(*x).sum(), both)(*twice),
    }
    for actual, expected in zip(transforms[transform](function), transforms[transform](reference), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("transform", ["grad_of_grad", "hessian"])
def test_second_derivatives_of_torch_func_are_refused(transform, place):
    function, reference, (first, second) = in_two("weighted_pool3d", place)
    transforms = {
        "grad_of_grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x, second).square().sum())(first),
        "hessian": lambda f: torch.func.hessian(lambda x: f(first, x))(second),
    }
    assert transforms[transform](reference).abs().max() > 0
    with pytest.raises(RuntimeError, match=f"^backend='{place[0]}' has no .*; use backend='reference', which is plain"):
        transforms[transform](function)
