"""prompt_relevance: every backend against the definition; zero, NaN and huge embeddings."""

import pytest
import torch
from cases import CASES, LAYOUTS, Case, cu_frames_of, make_inputs, matrix, with_layouts
from truth import check, check_dtypes

from ppllava_kernels import prompt_relevance

SIZES = ["divisible", "single", "ragged", "ragged_one_frame", "odd_channels", "many_channels", "gaps"]
LOW = ("divisible", "ragged_one_frame", "odd_channels", "many_channels")


@pytest.mark.parametrize(("case", "dtypes"), matrix(SIZES, LOW, rest=("gaps", "ragged")))
def test_against_reference(case, dtypes, place):
    check_dtypes("prompt_relevance", CASES[case], dtypes, place)


@pytest.mark.parametrize(("case", "layout"), with_layouts("divisible", "ragged"))
def test_strides(case, layout, place):
    check("prompt_relevance", CASES[case], make_inputs(CASES[case]), place, layout=LAYOUTS[layout])


def test_many_patches_take_several_programs(place):
    """More patches than one block or program of any backend handles."""
    # In the interpreter one frame, of more than the 512 patches that a sum takes at a time: programs take seconds.
    case = Case((1, 1, 23, 23), (8, 1)) if place == ("triton", "cpu") else Case((2, 5, 12, 11), (256, 1))
    check("prompt_relevance", case, make_inputs(case), place)


class TestMeaning:
    def test_is_softmax_of_scaled_cosines(self, backend):
        image, text = torch.randn(2, 1, 3, 4, 16), torch.randn(2, 16)
        cosine = torch.nn.functional.cosine_similarity(image, text[:, None, None, None], dim=-1)
        expected = (100 * cosine).flatten(1).softmax(1).view_as(cosine)
        relevance = prompt_relevance(image, text, backend=backend)
        torch.testing.assert_close(relevance, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(relevance.sum((1, 2, 3)), torch.ones(2))

    def test_scale_of_the_embeddings_is_nothing(self, backend):
        image, text = torch.randn(1, 1, 3, 4, 16), torch.randn(1, 16)
        relevance = prompt_relevance(image, text, logit_scale=3.0, backend=backend)
        torch.testing.assert_close(prompt_relevance(image * 64, text / 8, logit_scale=3.0, backend=backend), relevance)

    def test_zero_embedding_has_cosine_zero_and_no_gradient(self, backend):
        image, text = torch.randn(1, 1, 2, 2, 8), torch.randn(1, 8)
        image[0, 0, 1, 1] = 0
        image.requires_grad_()
        relevance = prompt_relevance(image, text, logit_scale=2.0, backend=backend)
        cosine = torch.nn.functional.cosine_similarity(image, text[:, None, None, None], dim=-1)
        torch.testing.assert_close(relevance, (2 * cosine).flatten(1).softmax(1).view_as(cosine))
        relevance[0, 0, 0, 0].backward()
        assert torch.equal(image.grad[0, 0, 1, 1], torch.zeros(8))
        assert image.grad[0, 0, 0, 0].abs().sum() > 0

    def test_zero_prompt_gives_the_uniform_relevance_and_no_gradient(self, backend):
        image, text = torch.randn(1, 1, 2, 2, 8), torch.zeros(1, 8, requires_grad=True)
        relevance = prompt_relevance(image, text, backend=backend)
        torch.testing.assert_close(relevance, torch.full((1, 1, 2, 2), 0.25))
        relevance[0, 0, 0, 0].backward()
        assert torch.equal(text.grad, torch.zeros(1, 8))

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    @pytest.mark.parametrize("case", ["divisible", "ragged"])
    def test_nan_stays_in_its_video(self, backend, case, poison):
        case = CASES[case]
        inputs = {name: x.to(torch.get_default_device()) for name, x in make_inputs(case).items()}
        image, text, cu_frames = inputs["image_embeds"], inputs["text_embeds"], cu_frames_of(case)
        clean = prompt_relevance(image, text, cu_frames=cu_frames, backend=backend)
        image = image.clone()
        image[(0,) * image.dim()] = poison
        relevance = prompt_relevance(image, text, cu_frames=cu_frames, backend=backend)
        first = 1 if cu_frames is None else int(cu_frames[1])
        assert relevance[:first].isnan().all()
        assert torch.equal(relevance[first:], clean[first:])


def test_one_channel_has_no_direction(place):
    """The cosine is 1 or -1 whatever the prompt's length: its gradient is nothing but what cancels."""
    backend, device = place
    image = torch.randn(1, 2, 5, 5, 1, device=device)
    text = torch.full((1, 1), 0.01, device=device, requires_grad=True)
    relevance = prompt_relevance(image, text, backend=backend)
    (1000 * relevance.square()).sum().backward()
    assert text.grad.abs().max() < 1e-5


def test_gradcheck():
    image = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    for backend in ("reference", "cpp"):
        function = lambda x, c, s: prompt_relevance(x, c, logit_scale=s, backend=backend)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, (image, text, scale))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logit_scale_tensor(shape, dtype, place):
    backend, device = place
    image, text = torch.randn(1, 1, 3, 4, 16, device=device), torch.randn(1, 16, device=device)
    scale = torch.full(shape, 8.0, dtype=dtype, device=device, requires_grad=True)
    relevance = prompt_relevance(image, text, logit_scale=scale, backend=backend)
    torch.testing.assert_close(relevance, prompt_relevance(image, text, logit_scale=8.0, backend=backend))
    relevance.square().sum().backward()
    assert scale.grad.shape == shape
    assert scale.grad.dtype == dtype
