"""prompt_guided_project and weighted_project: every backend against the definition, in the order of the original."""

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    GUIDE,
    LAYERS,
    LAYOUTS,
    Case,
    cu_frames_of,
    make_projector_inputs,
    matrix,
    with_layouts,
)
from close import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from truth import check, check_dtypes, run

from ppllava_kernels import prompt_guided_project, weighted_pool3d, weighted_project
from ppllava_kernels.backends import products

OP = "prompt_guided_project"


@pytest.fixture
def small_tiles(monkeypatch):
    """Of 7 patches, less than a frame, and 32 channels: windows lie in several tiles."""
    monkeypatch.setattr(products, "TILE", {"cpu": (7, 32), "cuda": (7, 32)})


# With few windows the second layer's backward is a product of few rows, which libraries sum in another way.
PROJECTED = CASES | {"many_channels": Case((1, 2, 6, 6), (130, 300))}


@pytest.mark.parametrize(("case", "dtypes"), matrix(PROJECTED))
def test_against_reference(case, dtypes, place):
    check_dtypes(OP, PROJECTED[case], dtypes, place)


@pytest.mark.parametrize("case", ["overlap", "ragged_adaptive"])
def test_windows_across_tiles(case, place, small_tiles):
    check_dtypes(OP, CASES[case], "fp32", place)


TILED = [(case, dtypes) for case in ("leftover", "gaps", "adaptive_overlap", "ragged") for dtypes in ("bf16", "fp64")]


@pytest.mark.parametrize(("case", "dtypes"), [*TILED, ("many_channels", "fp32"), ("many_channels", "bf16")])
def test_tiles_of_the_library(case, dtypes, small_tiles):
    check_dtypes(OP, PROJECTED[case], dtypes, ("cpp", "cpu"))


LARGE_WINDOWS = {
    "global": Case((1, 6, 5, 5), (8, 16), dict(kernel_size=(6, 5, 5))),  # more patches than a tile has rows
    "adaptive": Case((2, 7, 6, 6), (8, 16), dict(output_size=(1, 1, 2))),
    "ragged": Case((9, 5, 6), (8, 16), dict(output_size=1), (0, 1, 9)),
}


@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
@pytest.mark.parametrize("case", LARGE_WINDOWS)
def test_windows_larger_than_a_tile(case, dtypes, place):
    check(OP, LARGE_WINDOWS[case], make_projector_inputs(LARGE_WINDOWS[case], DTYPES[dtypes]), place)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("case", ["leftover", "overlap", "adaptive_up", "ragged", "ragged_adaptive"])
def test_scores_of_another_guide(case, weights, place):
    inputs = make_projector_inputs(CASES[case], DTYPES["mixed"])
    check("weighted_project", CASES[case], inputs | ({} if weights else {"weights": None}), place)


@pytest.mark.parametrize(("case", "layout"), with_layouts("divisible", "ragged_adaptive"))
def test_strides(case, layout, place):
    """Of the features; weights that are transposed, as those of a Conv1D, are taken, too."""
    inputs = make_projector_inputs(CASES[case])
    inputs["features"] = LAYOUTS[layout](inputs["features"])
    inputs |= {
        name: inputs[name].t().contiguous().t() for name in ("guide_weight", "linear_1_weight", "linear_2_weight")
    }
    vectors = ("norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias")
    inputs |= {name: torch.stack([inputs[name], torch.full_like(inputs[name], torch.nan)], 1)[:, 0] for name in vectors}
    check(OP, CASES[case], inputs, place)


@pytest.mark.parametrize("missing", ["norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias", "all"])
def test_without_biases(missing, place):
    inputs = make_projector_inputs(CASES["leftover"])
    names = [missing] if missing != "all" else ["norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias"]
    check(OP, CASES["leftover"], inputs | dict.fromkeys(names), place)


def test_is_original_order(backend):
    """Layer by layer, in float64 or float32, as a model does: pooling comes last."""
    dtype = F64 if backend in ("reference", "cpp") else F32
    case = CASES["ragged"]
    x = {k: v.to(torch.get_default_device(), dtype) for k, v in make_projector_inputs(case, DTYPES["fp64"]).items()}
    cu_frames = cu_frames_of(case)
    normed = torch.nn.functional.layer_norm(x["features"], x["features"].shape[-1:], *(x[k] for k in GUIDE[:2]), 1e-5)
    embeds, text = normed @ x["guide_weight"].T, x["text_embeds"]
    relevance = []
    for b, clip in enumerate(embeds.split(cu_frames.diff().tolist())):
        cosine = torch.nn.functional.cosine_similarity(clip, text[b], dim=-1)
        relevance.append((x["logit_scale"] * cosine).flatten().softmax(0).view_as(cosine))
    relevance = torch.cat(relevance)
    hidden = torch.nn.functional.gelu(x["features"] @ x["linear_1_weight"].T + x["linear_1_bias"])
    values = hidden @ x["linear_2_weight"].T + x["linear_2_bias"]
    expected = weighted_pool3d(values, relevance, **case.window, cu_frames=cu_frames, backend="reference")
    del x["weights"]
    actual = prompt_guided_project(
        **x, norm_eps=1e-5, **case.window, cu_frames=cu_frames, backend=backend, return_relevance=True
    )
    tolerance = 1e-11 if dtype == F64 else 1e-4
    torch.testing.assert_close(actual, (expected, relevance), rtol=tolerance, atol=tolerance)
    layers = {name: x[name] for name in LAYERS}
    pooled = weighted_project(x["features"], relevance, **layers, **case.window, cu_frames=cu_frames, backend=backend)
    torch.testing.assert_close(pooled, expected, rtol=tolerance, atol=tolerance)


def test_a_patch_that_the_guide_maps_to_zero(place):
    """A patch without variance is zero after a layer norm without bias: cosine 0, and no gradient through it."""
    case = CASES["divisible"]
    inputs = make_projector_inputs(case) | {"norm_bias": None}
    inputs["features"][0, 1, 1, 2] = 3.0
    backend, device = place
    there = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    outputs, expected = run(OP, case, there, backend), run(OP, case, inputs, "reference")
    for name, x in outputs.items():
        assert x.isfinite().all(), name
        # Near zero the layer norm amplifies what is left of rounding.
        if name in ("output", "relevance"):
            torch.testing.assert_close(x.cpu(), expected[name], rtol=1e-3, atol=1e-4)


def test_nan_stays_in_its_video(place):
    backend, device = place
    for case in (CASES["divisible"], CASES["ragged"]):
        inputs = make_projector_inputs(case)
        clean = {k: v.to(device) for k, v in inputs.items() if k != "weights"}
        inputs["features"][(0,) if case.cu_frames is None else slice(0, 2)] = torch.nan
        dirty = {k: v.to(device) for k, v in inputs.items() if k != "weights"}
        options = dict(norm_eps=1e-5, **case.window, cu_frames=cu_frames_of(case), backend=backend)
        expected, actual = prompt_guided_project(**clean, **options), prompt_guided_project(**dirty, **options)
        assert actual[0].isnan().all()
        assert torch.equal(actual[1:], expected[1:])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_patch_that_is_not_finite_spoils_its_windows_alone(poison, place):
    backend, device = place
    case = Case((1, 2, 4, 4), (5, 7), dict(kernel_size=2))
    inputs = make_projector_inputs(case)
    inputs["features"][0, 0, 3, 0] = poison
    inputs = {k: inputs[k].to(device) for k in ("features", "weights", *LAYERS)}
    pooled = weighted_project(**inputs, **case.window, backend=backend)[0, 0]  # [2, 2, D]
    assert pooled[1, 0].isnan().all()
    pooled[1, 0] = 0
    assert pooled.isfinite().all()


def test_a_patch_far_from_zero_in_float16(place):
    """V is no multiple of what is loaded at a time, and beyond it nothing may overflow."""
    case = Case((1, 1, 2, 2), (5, 100), dict(kernel_size=1))
    inputs = make_projector_inputs(case, DTYPES["fp16"]) | {"norm_weight": None, "norm_bias": None}
    inputs["features"][0, 0, 0, 0] = 300.0 + inputs["features"][0, 0, 0, 0]
    check(OP, case, inputs, place)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_channel_on_any_number_of_threads(threads, dtype):
    """The first layer's channels are split where there are few windows."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for channels in (1, 63, 64, 129, 300, 515, 516, 1024, 1540):
            features, weight = torch.randn(1, 2, 4, 4, 8, dtype=dtype), torch.randn(channels, 8, dtype=dtype)
            layers = dict(linear_1_bias=None, linear_2_weight=torch.eye(channels, dtype=dtype), linear_2_bias=None)
            hidden = torch.nn.functional.gelu(features @ weight.T)  # [B, T, H, W, D']
            for window in (dict(output_size=1), dict(output_size=(1, 1, 2)), dict(kernel_size=(2, 2, 2))):
                expected = weighted_pool3d(hidden, None, **window, backend="reference")
                pooled = weighted_project(features, None, linear_1_weight=weight, **layers, **window, backend="cpp")
                torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_rows_far_from_zero(place):
    """The mean of a row may be far larger than its spread: it is subtracted before anything is multiplied."""
    case = CASES["leftover"]
    inputs = make_projector_inputs(case)
    inputs["features"] = inputs["features"] + 30.0
    check(OP, case, inputs, place)


def test_same_bits_every_time(place):
    backend, device = place
    inputs = {k: v.to(device) for k, v in make_projector_inputs(CASES["ragged"], DTYPES["bf16"]).items()}
    first, second = (run(OP, CASES["ragged"], inputs, backend) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


def test_autocast(place):
    """The products are in autocast's dtype; the norm before the guide is not, nor are relevance and pooling."""
    backend, device = place
    case = CASES["leftover"]
    inputs = {k: v.to(device).requires_grad_() for k, v in make_projector_inputs(case).items() if k != "weights"}
    options = dict(norm_eps=1e-5, **case.window, return_relevance=True)
    exact = prompt_guided_project(**{k: v.detach().double() for k, v in inputs.items()}, **options, backend="reference")
    with torch.autocast(device, torch.bfloat16):
        actual = prompt_guided_project(**inputs, **options, backend=backend)
        eager = prompt_guided_project(**inputs, **options, backend="reference")
    assert [x.dtype for x in actual] == [torch.bfloat16, torch.float32]
    for name, *some in zip(("pooled", "relevance"), actual, eager, exact):
        x, other, wanted = (x.detach() for x in some)
        assert_close(f"{backend} {name}", x, [other], wanted)
    (actual[0].float().square().mean() + actual[1].square().sum()).backward()
    for name, x in inputs.items():
        assert x.grad.dtype == torch.float32, name
        assert x.grad.isfinite().all(), name
        assert x.grad.abs().max() > 0, name


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(("own", "other"), [(BF16, F16), (F16, BF16)])
def test_autocast_of_16_bits_to_16_others(own, other, backend):
    """The norm stays as it is, the products change; as a model in bfloat16 under the autocast of a training loop."""
    inputs = {k: v for k, v in make_projector_inputs(CASES["leftover"], (own,) * 4).items() if k != "weights"}
    options = dict(norm_eps=1e-5, **CASES["leftover"].window, return_relevance=True, temperature=1.0, backend=backend)
    expected, relevance = prompt_guided_project(**inputs, **options)
    with torch.autocast("cpu", other):
        actual = prompt_guided_project(**inputs, **options)
    assert actual[0].dtype == other
    torch.testing.assert_close(actual[0].float(), expected.float(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(actual[1], relevance, rtol=0.05, atol=1e-3)


def test_a_norm_in_float32(place):
    """As after model.bfloat16() and norm.float(): it is one of float32, and its gradients are."""
    case = CASES["ragged"]
    inputs = make_projector_inputs(case, DTYPES["bf16"])
    check(OP, case, inputs | {name: inputs[name].float() + 0.001 for name in ("norm_weight", "norm_bias")}, place)


@pytest.mark.parametrize(
    ("wanted", "guide_tiles", "weight_products"),
    [
        ("features", 1, 1),
        ("text_embeds", 1, 0),
        ("norm_weight", 1, 0),
        ("guide_weight", 1, 1),
        ("linear_1_weight", 0, 1),
        ("linear_1_bias", 0, 0),
        ("linear_2_weight", 0, 0),
        ("logit_scale", 0, 0),
    ],
)
def test_only_what_is_asked_for(wanted, guide_tiles, weight_products, monkeypatch):
    """With the gradient of one tensor alone it is the same, and products for the others are not made."""
    case = CASES["leftover"]
    inputs = {k: v for k, v in make_projector_inputs(case).items() if k != "weights"}
    options = dict(norm_eps=1e-5, **case.window, backend="cpp")
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    prompt_guided_project(**leaves, **options).square().sum().backward()
    alone = inputs | {wanted: inputs[wanted].clone().requires_grad_()}
    pooled = prompt_guided_project(**alone, **options)
    seen = {"guide": 0, "product": 0}
    count_calls(monkeypatch, products.Norm, "__call__", seen, "guide")
    count_calls(monkeypatch, products, "_add_product", seen, "product")
    pooled.square().sum().backward()
    assert seen == {"guide": guide_tiles * case.batch, "product": weight_products * case.batch}
    torch.testing.assert_close(alone[wanted].grad, leaves[wanted].grad, rtol=1e-6, atol=1e-7)


def count_calls(monkeypatch, owner, name, seen, key):
    function = getattr(owner, name)

    def counted(*arguments):
        seen[key] += 1
        return function(*arguments)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("z", [-4.0, -4.25, -4.5, -30.0, -1e3, -1e4, float("-inf")])
def test_gelu_far_below_zero(z, place):
    """Features in the thousands are usual: what an approximation leaves of gelu there is multiplied by them."""
    backend, device = place
    channels = 67  # more than one vector, and a rest
    features = torch.full((1, 1, 1, 2, 1), z, dtype=BF16, device=device)
    ones = dict(dtype=BF16, device=device)
    layers = dict(linear_1_weight=torch.ones(channels, 1, **ones), linear_1_bias=None)
    layers |= dict(linear_2_weight=torch.eye(channels, **ones), linear_2_bias=None)
    pooled = weighted_project(features, None, **layers, kernel_size=(1, 1, 2), backend=backend)
    expected = torch.nn.functional.gelu(features.double())[..., :1, :].expand(1, 1, 1, 1, channels)
    torch.testing.assert_close(pooled.double(), expected, rtol=2**-8, atol=6e-5, equal_nan=True)


def test_float16_on_a_cpu_is_multiplied_as_float32():
    """In the second layer, too, forward and backward: PyTorch's own float16 products are many times slower."""
    inputs = make_projector_inputs(CASES["leftover"], DTYPES["fp16"])
    inputs = {k: v.requires_grad_() for k, v in inputs.items() if k not in ("text_embeds", "logit_scale", *GUIDE)}
    with Products() as seen:
        weighted_project(**inputs, **CASES["leftover"].window, backend="cpp").sum().backward()
    assert seen.dtypes == {torch.float32}


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.dtypes |= {x.dtype for x in args if isinstance(x, torch.Tensor)}
        return function(*args, **(kwargs or {}))
