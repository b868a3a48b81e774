"""`weighted_pool3d` against the original's pooling (tests/golden/README.md)."""

import re

import pytest
import torch
from golden_data import close, golden, meta

from ppllava_kernels import weighted_pool3d

CASES = meta("pool3d")["cases"]
CALLS = [name for case in CASES.values() for name in case["outputs"]]
# The original asks for 3 windows where 4 fit, and its view then cuts across them; the ops take no such arguments.
IMPOSSIBLE = "outsize_kernel"


def call(name):
    case = CASES[name.split("/")[0]]
    return case, case["outputs"][name]


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(IMPOSSIBLE)])
def test_pool3d(name):
    (case, options), inputs = call(name), golden("pool3d", "inputs")
    stem = name.split("/")[0]
    values = inputs[f"{stem}/input"].permute(0, 2, 3, 4, 1).contiguous()  # [N, D, H, W, C]
    kind = options.get("weights") or ("none" if "none" in name else None)
    weights = None if kind == "none" else inputs[f"{stem}/weights_{kind}"]
    window = {"kernel_size": case["resolved"]["kernel"], "stride": case["resolved"]["stride"]}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.get("dtype"), torch.float32)
    if weights is not None:
        weights = weights.to(dtype)
    pooled = weighted_pool3d(values.to(dtype), weights, temperature=options.get("temperature", 1.0), **window)
    if "error" in options:
        # The original makes ones of shape (N, D, W, H) there and fails; equal weights are a plain mean.
        means = torch.nn.functional.avg_pool3d(inputs[f"{stem}/input"], *window.values())
        close(pooled.permute(0, 4, 1, 2, 3), means, 1e-5)
        return
    tolerance = 1e-5
    if dtype != torch.float32:
        # The original rounds each exponent w / t and each product; the op computes in float32.
        eps, largest = torch.finfo(dtype).eps, (weights.float() / options["temperature"]).abs().max()
        tolerance = float(values.abs().max() * eps * (2 * largest + 4))
    expected = golden("pool3d", "outputs")[name]
    close(pooled.permute(0, 4, 1, 2, 3).float(), expected.float(), tolerance)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith(IMPOSSIBLE)])
def test_pool3d_of_windows_that_do_not_fit(name):
    case, _ = call(name)
    values = golden("pool3d", "inputs")[f"{IMPOSSIBLE}/input"].permute(0, 2, 3, 4, 1)
    arguments = {"output_size": tuple(case["args"]["output_size"]), "kernel_size": tuple(case["args"]["kernel"])}
    with pytest.raises(ValueError, match=r"^exactly one of kernel_size and output_size must be given"):
        weighted_pool3d(values, None, **arguments)


ERRORS = {
    "all_three": {"output_size": 2, "kernel_size": 2, "stride": 1},
    "stride_only": {"stride": 1},
    "nothing": {},
    "outsize_kernel_with_a_1": {"output_size": (1, 2, 2), "kernel_size": 2},
    "one_frame_kernel2": {"kernel_size": (2, 1, 1)},
}
# What the original rejects, and the ops give a meaning.
MEANINGS = {
    "kernel_only": {"kernel_size": (2, 3, 3)},
    "outsize_larger_than_input": {"output_size": (8, 8, 8)},
    "weights_none_nonsquare_view_fails (H=7,W=4,k=s=(1,4,2))": {"kernel_size": (1, 4, 2)},
}


@pytest.mark.parametrize("name", meta("pool3d")["errors"])
def test_pool3d_error(name):
    if name in MEANINGS:
        values = torch.rand(1, 4, 7, 4, 3)
        pooled = weighted_pool3d(values, None, **MEANINGS[name])
        channels_first = values.permute(0, 4, 1, 2, 3)
        size = MEANINGS[name].get("output_size")
        average = torch.nn.functional.adaptive_avg_pool3d if size else torch.nn.functional.avg_pool3d
        close(pooled.permute(0, 4, 1, 2, 3), average(channels_first, size or MEANINGS[name]["kernel_size"]), 1e-5)
    else:
        with pytest.raises(ValueError, match=re.compile("; ")):
            weighted_pool3d(torch.rand(1, 1, 7, 4, 3), None, **ERRORS[name])
