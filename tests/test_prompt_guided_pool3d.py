"""prompt_guided_pool3d: every backend against the definition, and as the two ops that it is made of."""

import itertools

import pytest
import torch
from cases import CASES, LAYOUTS, Case, cu_frames_of, make_inputs, matrix, with_layouts
from truth import check, check_dtypes

from ppllava_kernels import PromptGuidedPool3d, prompt_guided_pool3d, prompt_relevance, weighted_pool3d


@pytest.mark.parametrize(("case", "dtypes"), matrix(CASES))
def test_against_reference(case, dtypes, place):
    check_dtypes("prompt_guided_pool3d", CASES[case], dtypes, place)


@pytest.mark.parametrize(("case", "layout"), with_layouts("divisible", "ragged_adaptive"))
def test_strides(case, layout, place):
    check("prompt_guided_pool3d", CASES[case], make_inputs(CASES[case]), place, layout=LAYOUTS[layout])


@pytest.mark.parametrize("case", ["leftover", "ragged"])
def test_is_the_two_ops(case, place):
    backend, device = place
    inputs = {k: v.to(device) for k, v in make_inputs(CASES[case]).items()}
    cu_frames, window = cu_frames_of(CASES[case]), CASES[case].window
    image, text, values = inputs["image_embeds"], inputs["text_embeds"], inputs["values"]
    expected = prompt_relevance(image, text, cu_frames=cu_frames, backend=backend)
    pooled, relevance = prompt_guided_pool3d(
        values, image, text, cu_frames=cu_frames, return_relevance=True, backend=backend, **window
    )
    torch.testing.assert_close(relevance, expected, rtol=1e-6, atol=0)
    expected = weighted_pool3d(values, expected, cu_frames=cu_frames, backend=backend, **window)
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)


def test_a_ragged_batch_is_its_clips(place):
    """Bit for bit: packing must not change a clip's result, whatever its neighbours are."""
    backend, device = place
    case = CASES["ragged"]
    inputs = {k: v.to(device) for k, v in make_inputs(case).items()}
    names = ("values", "image_embeds")
    packed = prompt_guided_pool3d(
        *(inputs[n] for n in names), inputs["text_embeds"], cu_frames=cu_frames_of(case), backend=backend, **case.window
    )
    alone = []
    for b, (start, end) in enumerate(zip(case.cu_frames, case.cu_frames[1:])):
        clip = (inputs[n][start:end][None] for n in names)
        alone.append(prompt_guided_pool3d(*clip, inputs["text_embeds"][b : b + 1], backend=backend, **case.window)[0])
    assert torch.equal(packed, torch.cat(alone))


@pytest.mark.parametrize(
    "window", [dict(kernel_size=(1, 2, 1)), dict(output_size=(2, 1, 1))], ids=["kernel", "adaptive"]
)
def test_many_clips(window, place):
    """More clips of different length than one launch of any backend takes; on a CPU that is few."""
    ends = (0, *itertools.accumulate(1 + n % 3 for n in range(70 if place[1] == "cuda" else 7)))
    case = Case((ends[-1], 2, 2), (8, 8), window, cu_frames=ends)
    check("prompt_guided_pool3d", case, make_inputs(case), place)


def test_windows_of_many_patches(place):
    """More patches in a window, and windows on a patch, than one warp or tile of any backend takes at a time."""
    size = (1, 5, 5, 3) if place == ("triton", "cpu") else (2, 7, 7, 5)  # the interpreter would take a minute
    case = Case(size, (8, 16), dict(kernel_size=(4, 4, 3), stride=1))
    check("prompt_guided_pool3d", case, make_inputs(case), place)


def test_two_runs_give_the_same_bits(place):
    backend, device = place
    case = CASES["overlap"]

    def once():
        inputs = {k: v.to(device).requires_grad_() for k, v in make_inputs(case).items() if k != "weights"}
        pooled = prompt_guided_pool3d(**inputs, backend=backend, **case.window)
        pooled.square().sum().backward()
        return [pooled, *(x.grad for x in inputs.values())]

    assert all(torch.equal(a, b) for a, b in zip(once(), once()))


@pytest.mark.parametrize("frozen", ["values", "image_embeds", "text_embeds", "logit_scale"])
def test_inputs_that_need_no_gradient(frozen, place):
    backend, device = place
    case = CASES["divisible"]
    inputs = {k: v.to(device) for k, v in make_inputs(case).items() if k != "weights"}

    def grads(*wanted):
        leaves = {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}
        pooled = prompt_guided_pool3d(**leaves, backend=backend, **case.window)
        pooled.square().sum().backward()
        return {k: leaves[k].grad for k in leaves}

    some, every = grads(*(k for k in inputs if k != frozen)), grads(*inputs)
    assert some[frozen] is None
    assert all(torch.equal(some[k], every[k]) for k in inputs if k != frozen)


def test_gradcheck():
    double = dict(dtype=torch.float64, requires_grad=True)
    inputs = (torch.randn(1, 2, 3, 3, 2, **double), torch.randn(1, 2, 3, 3, 3, **double), torch.randn(1, 3, **double))
    for backend in ("reference", "cpp"):
        function = lambda v, x, c: prompt_guided_pool3d(  # noqa: E731
            v, x, c, kernel_size=2, stride=1, logit_scale=3.0, temperature=0.5, return_relevance=True, backend=backend  # noqa: B023
        )  # fmt: skip
        assert torch.autograd.gradcheck(function, inputs)


def test_module_trains_its_scale():
    case = CASES["divisible"]
    inputs = make_inputs(case)
    module = PromptGuidedPool3d((2, 3, 3), logit_scale=torch.nn.Parameter(torch.tensor(5.0)), return_relevance=True)
    arguments = inputs["values"], inputs["image_embeds"], inputs["text_embeds"]
    pooled, relevance = module(*arguments)
    expected = prompt_guided_pool3d(*arguments, kernel_size=(2, 3, 3), logit_scale=5.0)
    assert torch.equal(pooled, expected)
    relevance.square().sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["logit_scale"]
    assert module.logit_scale.grad.abs() > 0
