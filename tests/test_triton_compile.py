"""Without a GPU: every Triton kernel compiles for several, no register is spilled, and launches are as they must be."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, cu_frames_of, make_inputs
from truth import check

from ppllava_kernels import prompt_guided_pool3d, prompt_relevance
from ppllava_kernels.backends.triton import backend

SCRIPT = Path(__file__).parent / "compile_triton.py"
KERNELS = {
    "score_patches", "normalise_patches", "grad_sums", "relevance_backward", "finish_backward", "pool_windows",
    "backward_windows", "backward_patches", "row_statistics", "guide_product", "combine_scores", "pool_products",
    "hidden_backward", "window_means",
}  # fmt: skip
SCORES = ("normalise_patches", "grad_sums", "combine_scores", "window_means")  # read no channels
ROWS = ("relevance_backward", "pool_windows", "backward_patches", "pool_products", "hidden_backward")  # write them


def compiled(arch: str, dtype: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), arch, dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == KERNELS
    return rows


@pytest.mark.stamped("ppllava_kernels")
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [("80", "bfloat16"), ("90", "bfloat16"), ("90", "float32"), ("100", "bfloat16"), ("100", "float16")],
)
def test_no_spills(arch, dtype):
    for row in compiled(arch, dtype):
        assert row["stack"] == 0, row
        assert row["registers"] < 255, row
        # Of rows of channels, 16 bytes by each lane.
        if row["kernel"] not in SCORES and row.get("NEED_WEIGHTS", True) and row.get("NEED_VALUES", True):
            assert row["load"] == 16, row
            if row["kernel"] in ROWS:
                assert row["store"] == 16, row
                # As interpreter.py rounds.
                assert row["rounding"] == ("" if dtype == "float32" else "rn"), row
        assert row["rounding"] in ("", "rn"), row


@pytest.mark.stamped("ppllava_kernels")
def test_compiles_for_amd():
    compiled("gfx942", "bfloat16")


class Recorded:
    """A kernel that keeps the grids of its launches and runs nothing."""

    def __init__(self, kernel, grids):
        self.arg_names, self.grids = kernel.arg_names, grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def modules():
    if backend.why_not() is not None:
        pytest.skip(backend.why_not())
    from ppllava_kernels.backends.triton import common, prompt_relevance, weighted_pool3d

    yield common, prompt_relevance, weighted_pool3d
    common._plan.cache_clear()


@pytest.mark.interpreter
@pytest.mark.parametrize("ragged", [False, True])
def test_more_clips_than_grid_y_has_room_for(ragged, modules, monkeypatch):
    batch, grids = 70_000, []
    for module in modules:
        for name in KERNELS & vars(module).keys():
            monkeypatch.setattr(module, name, Recorded(getattr(module, name), grids))
    lead = (batch, 1, 2) if ragged else (batch, 1, 1, 2)
    cu_frames = torch.arange(batch + 1, dtype=torch.int32) if ragged else None
    shapes = ((*lead, 1), (*lead, 1), (batch, 1))  # values, image_embeds, text_embeds
    leaves = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for window in (dict(kernel_size=1), dict(output_size=1)):
        pooled = prompt_guided_pool3d(*leaves, cu_frames=cu_frames, backend="triton", **window)
        torch.autograd.grad(pooled.sum(), leaves)
    assert len(grids) == 2 * 7
    assert all(len(grid) == 1 and batch <= grid[0] < 2**31 for grid in grids)


@pytest.mark.interpreter
def test_a_grid_that_is_too_large(modules):
    common = modules[0]
    message = (
        r"backend='triton' could not run its kernel, which takes 2147483648 programs of at most 2\*\*31 - 1; "
        "split the batch"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        common.launch(None, 2**31, torch.device("cpu"), {}, common.CONFIG.pool_windows)


@pytest.mark.interpreter
def test_cuda_graphs_keep_the_clip_table(modules, monkeypatch):
    """What was uploaded before the capture is used, from any stream, and never freed; nothing is uploaded during it."""
    common, device = modules[0], torch.device("cuda", 0)
    monkeypatch.setattr(common, "_captured", [])
    monkeypatch.setattr(common, "current_raw_stream", lambda index: 7)
    values = torch.zeros(6, 2, 2, 1)
    plan = common.make_plan(values, torch.tensor([0, 1, 6], dtype=torch.int32))
    assert common.make_plan(values, torch.tensor([0, 1, 6], dtype=torch.int32)) is plan

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    message = (
        "cu_frames must be known before a CUDA graph captures a call with backend='triton', got clips of [1, 5] frames "
        "for the first time; make the same call once before the capture"
    )
    with pytest.raises(RuntimeError) as error:
        common.clip_arguments(plan, device)
    assert str(error.value) == message

    table = torch.tensor(plan.table)  # [6, B]
    plan.uploaded[device] = 7, table
    for _ in range(2):
        assert common.clip_arguments(plan, device)["clips"] is table
    assert len(common._captured) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert common.clip_arguments(plan, device)["clips"] is table


@pytest.mark.interpreter
def test_parts_of_a_clip_are_its_own(modules, monkeypatch):
    """With few parts a part has several tiles, as many as its own clip asks for: neighbours change no bit."""
    common = modules[0]
    for module in modules:
        monkeypatch.setattr(module, "CONFIG", replace(common.CONFIG, parts=4))
    common._plan.cache_clear()
    case = CASES["ragged"]
    inputs = make_inputs(case)
    assert common.make_plan(inputs["image_embeds"], cu_frames_of(case)).table[3] == (0, 4, 7)  # of 4, 6 and 8 tiles
    check("prompt_guided_pool3d", case, inputs, ("triton", "cpu"))
    image, text = inputs["image_embeds"], inputs["text_embeds"]
    packed = prompt_relevance(image, text, cu_frames=cu_frames_of(case), backend="triton")
    for b, (start, end) in enumerate(zip(case.cu_frames, case.cu_frames[1:])):
        alone = prompt_relevance(image[None, start:end], text[b : b + 1], backend="triton")
        assert torch.equal(packed[start:end], alone[0])


@pytest.mark.interpreter
def test_precision_is_that_of_pytorch(modules):
    """Each of PyTorch's ways to say it; each refuses to be read after another was used, so in a process each."""
    program = """
import os
import torch
from ppllava_kernels.backends.triton.common import product_of
x = torch.ones(1)
assert product_of(x).arguments(x)["PRECISION"] == "ieee"
ways = (
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends, "fp32_precision", "tf32"),
)
for n, way in enumerate(ways):
    child = os.fork()
    if child == 0:
        way()
        os._exit(product_of(x).arguments(x)["PRECISION"] != "tf32")
    assert os.waitpid(child, 0)[1] == 0, f"way {n}"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=100)
