"""weighted_pool3d: every backend against the definition, and the definition against PyTorch and the original."""

import json
from pathlib import Path

import pytest
import torch
from cases import CASES, LAYOUTS, make_inputs, matrix, with_layouts
from safetensors.torch import load_file
from truth import check, check_dtypes

from ppllava_kernels import WeightedPool3d, pooled_size, weighted_pool3d

GOLDEN = Path(__file__).parent / "golden" / "pool3d"
META = json.loads((GOLDEN / "meta.json").read_text())["cases"]


@pytest.mark.parametrize(("case", "dtypes"), matrix(CASES))
def test_against_reference(case, dtypes, place):
    check_dtypes("weighted_pool3d", CASES[case], dtypes, place)


@pytest.mark.parametrize(("case", "layout"), with_layouts("divisible", "overlap", "adaptive", "ragged"))
def test_strides(case, layout, place):
    check("weighted_pool3d", CASES[case], make_inputs(CASES[case]), place, layout=LAYOUTS[layout])


@pytest.mark.parametrize("case", ["leftover", "overlap", "adaptive_overlap", "ragged", "ragged_adaptive"])
def test_without_weights_is_the_mean(case, place):
    check("weighted_pool3d", CASES[case], make_inputs(CASES[case]) | {"weights": None}, place)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 30])
def test_temperature(temperature, place):
    inputs = make_inputs(CASES["overlap"])
    check("weighted_pool3d", CASES["overlap"], inputs, place, temperature=temperature)


def channels_first(x):
    return x.movedim(-1, 1)


class TestAgainstPyTorch:
    """Equal weights give AvgPool3d and AdaptiveAvgPool3d."""

    @pytest.mark.parametrize("equal", [None, 0.25])
    def test_avg_pool3d(self, backend, equal):
        values = torch.randn(2, 3, 4, 5, 8)
        weights = None if equal is None else torch.full((2, 3, 4, 5), equal)
        pooled = weighted_pool3d(values, weights, kernel_size=(2, 3, 3), stride=(1, 1, 2), backend=backend)
        expected = torch.nn.functional.avg_pool3d(channels_first(values), (2, 3, 3), (1, 1, 2))
        torch.testing.assert_close(channels_first(pooled), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("output_size", [(2, 2, 2), (3, 4, 1), (3, 4, 5), (4, 5, 2)])
    def test_adaptive_avg_pool3d(self, backend, output_size):
        values = torch.randn(1, 3, 4, 5, 8)
        pooled = weighted_pool3d(values, None, output_size=output_size, backend=backend)
        expected = torch.nn.functional.adaptive_avg_pool3d(channels_first(values), output_size)
        torch.testing.assert_close(channels_first(pooled), expected, rtol=1e-6, atol=1e-6)


# The original's plain mean transposes H and W: it is right for square grids alone.
SQUARE = {"overlap_square", "outsize_square"}
# Here kernel and stride make more windows than output_size, and the original reshapes the elements of all of them into
# output_size windows, which mixes them.
SCRAMBLED = {"outsize_kernel"}


def golden_outputs():
    for case in META.keys() - SCRAMBLED:
        meta = META[case]
        for name, output in meta["outputs"].items():
            if "error" not in output and not (output["weights"] == "none" and case not in SQUARE):
                yield pytest.param(case, name, id=name)


@pytest.mark.parametrize(("case", "name"), sorted(golden_outputs(), key=lambda p: p.id))
def test_golden(case, name, backend):
    """The original's own outputs; its windows for `output_size`, not PyTorch's, are named by kernel and stride."""
    device = str(torch.get_default_device())
    inputs, outputs = (load_file(GOLDEN / f"{name}.safetensors", device) for name in ("inputs", "outputs"))
    meta = META[case]["outputs"][name]
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[meta.get("dtype")]
    values = inputs[f"{case}/input"].movedim(1, -1).contiguous().to(dtype)
    weights = None if meta["weights"] == "none" else inputs[f"{case}/weights_{meta['weights']}"].to(dtype)
    window = {k: META[case]["resolved"][k] for k in ("kernel", "stride")}
    pooled = weighted_pool3d(
        values, weights, kernel_size=window["kernel"], stride=window["stride"], temperature=meta["temperature"],
        backend=backend,
    )  # fmt: skip
    # In low precision the original computes its softmax there, too: scores / 0.01 are rounded to about 1 %.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    expected = outputs[name].to(dtype)
    torch.testing.assert_close(channels_first(pooled), expected, rtol=tolerance, atol=tolerance)


def test_golden_exceptions_are_bugs_of_the_original():
    for case in SCRAMBLED:
        stored = load_file(GOLDEN / "outputs.safetensors")[f"{case}/out_prob_t1"].shape[2:]
        size = load_file(GOLDEN / "inputs.safetensors")[f"{case}/input"].shape[2:]
        assert pooled_size(size, META[case]["resolved"]["kernel"], META[case]["resolved"]["stride"]) != tuple(stored)
    crashed = {case for case, meta in META.items() if any("error" in output for output in meta["outputs"].values())}
    assert len(crashed) > 3
    assert not crashed & SQUARE


def test_minus_infinity_leaves_a_patch_out(place):
    backend, device = place
    values, weights = torch.randn(1, 2, 2, 2, 8), torch.zeros(1, 2, 2, 2)
    weights[0, 0] = -torch.inf
    pooled = weighted_pool3d(values.to(device), weights.to(device), kernel_size=2, backend=backend).cpu()
    torch.testing.assert_close(pooled[0, 0, 0, 0], values[0, 1].flatten(0, 1).mean(0))


def test_gradcheck():
    values = torch.randn(1, 3, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    for window in (dict(kernel_size=(2, 2, 3), stride=1), dict(output_size=(2, 2, 3))):
        for backend in ("reference", "cpp"):
            function = lambda v, w: weighted_pool3d(v, w, temperature=0.5, backend=backend, **window)  # noqa: B023, E731
            assert torch.autograd.gradcheck(function, (values, weights))


def test_module():
    values, weights = torch.randn(1, 4, 6, 6, 8), torch.rand(1, 4, 6, 6)
    module = WeightedPool3d((2, 3, 3), temperature=0.1, backend="cpp")
    expected = weighted_pool3d(values, weights, kernel_size=(2, 3, 3), temperature=0.1, backend="cpp")
    assert torch.equal(module(values, weights), expected)
    assert repr(module) == "WeightedPool3d(kernel_size=(2, 3, 3), temperature=0.1, backend='cpp')"


def test_pooled_size():
    assert pooled_size((32, 24, 24), (2, 3, 3)) == (16, 8, 8)
    assert pooled_size((5, 24, 25), (2, 3, 3), (1, 3, 3)) == (4, 8, 8)
    assert pooled_size((7, 9, 9), output_size=4) == (4, 4, 4)
    with pytest.raises(ValueError, match=r"kernel_size must fit into the clip, got kernel_size \(2, 3, 3\) for"):
        pooled_size((1, 24, 24), (2, 3, 3))
