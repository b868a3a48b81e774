"""No kernel reads or writes outside of what it is given."""

import pytest
import torch
from cases import CASES, OPS, cast, cu_frames_of, make_inputs, run, sliced

from ppllava_kernels import prompt_guided_pool3d, prompt_relevance

SENTINEL = 42.0


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["leftover", "gaps", "ragged", "adaptive_overlap", "odd_channels"])
def test_nothing_around_the_inputs_counts(op, case, place):
    """Inputs as views into buffers of NaN: one element read too many would show in values or gradients."""
    backend, device = place
    tensors = {k: v.to(device) for k, v in make_inputs(CASES[case]).items()}
    views = {k: v if k == "logit_scale" else sliced(v) for k, v in tensors.items()}
    expected, actual = run(op, CASES[case], tensors, backend), run(op, CASES[case], views, backend)
    for name, x in expected.items():
        assert not x.isnan().any()
        torch.testing.assert_close(actual[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["leftover", "gaps"])
def test_dropped_patches_do_not_count(case, place):
    """NaN in leftover frames and in gaps stays there: it touches no output, and its own gradient is zero."""
    backend, device = place
    window = CASES[case].window
    dropped = torch.ones(CASES[case].size, dtype=torch.bool)
    grad = run("weighted_pool3d", CASES[case], make_inputs(CASES[case]), "reference")["grad of values"]
    dropped = (grad == 0).all(-1)
    assert dropped.any(), window
    tensors = make_inputs(CASES[case])
    tensors["values"][dropped] = torch.nan
    actual = run("weighted_pool3d", CASES[case], {k: v.to(device) for k, v in tensors.items()}, backend)
    assert not actual["output"].isnan().any()
    assert (actual["grad of values"].cpu()[dropped] == 0).all()
    assert not actual["grad of weights"].isnan().any()


def test_offsets_beyond_32_bits(place, tmp_path):
    """Frames that lie more than 2**31 elements apart: two hours of video at the width of a language model."""
    backend, device = place
    if place == ("triton", "cpu"):
        pytest.skip("Triton's interpreter copies the whole storage of 8 GB; `make gpu` runs this on a GPU")
    apart, shape = 2**31 + 8, (1, 3, 2, 2, 8)
    strides = (0, apart, 16, 8, 1)
    if device == "cpu":  # of a sparse file, which takes no memory where nothing is written
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=2 * apart + 32, dtype=torch.bfloat16)
    else:
        far = torch.zeros(2 * apart + 32, dtype=torch.bfloat16, device=device)
    values = far.as_strided(shape, strides)
    values.copy_(torch.randn(shape))
    image, text = torch.randn(shape, device=device), torch.randn(1, 8, device=device)
    window = dict(kernel_size=(3, 1, 2), backend=backend)
    pooled = prompt_guided_pool3d(values, image, text, **window)
    assert torch.equal(pooled, prompt_guided_pool3d(values.contiguous(), image, text, **window))
    image = values.contiguous()
    assert torch.equal(prompt_relevance(values, text, backend=backend), prompt_relevance(image, text, backend=backend))


class Guarded:
    """torch.empty and new_empty that hand out views into buffers of sentinels, and remember the buffers."""

    def __init__(self, monkeypatch):
        self.buffers = []
        self.empty, self.new_empty, self.empty_like = torch.empty, torch.Tensor.new_empty, torch.empty_like
        monkeypatch.setattr(torch, "empty", self.guard)
        monkeypatch.setattr(torch, "empty_like", lambda x: self.guard(x.shape, dtype=x.dtype, device=x.device))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape, **options: self.new(x, *shape, **options))

    def guard(self, *shape, dtype=torch.float32, device="cpu"):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = 1
        for n in shape:
            count *= n
        buffer = self.empty(count + 512, dtype=dtype, device=device)
        buffer.fill_(SENTINEL)
        buffer[256 : 256 + count] = torch.nan
        self.buffers.append((buffer, count))
        return buffer[256 : 256 + count].view(shape)

    def new(self, x, *shape, dtype=None, **options):
        if options:  # a call of Triton's interpreter, not of a backend
            return self.new_empty(x, *shape, **options)
        return self.guard(*shape, dtype=dtype or x.dtype, device=x.device)

    def check(self):
        assert self.buffers
        for buffer, count in self.buffers:
            assert (buffer[:256] == SENTINEL).all(), "written before the buffer"
            assert (buffer[256 + count :] == SENTINEL).all(), "written after the buffer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", ["leftover", "gaps", "ragged", "adaptive_overlap", "odd_channels", "single"])
def test_nothing_around_the_outputs_is_written(op, case, dtype, place, monkeypatch):
    backend, device = place
    tensors = {k: v.to(device) for k, v in cast(make_inputs(CASES[case]), dtype).items()}
    guarded = Guarded(monkeypatch)
    outputs = run(op, CASES[case], tensors, backend)
    monkeypatch.undo()
    guarded.check()
    assert not any(x.isnan().any() for x in outputs.values()), "an element was not written"


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", ["divisible", "ragged", "ragged_adaptive"])
def test_nan_stays_in_its_video(case, poison, place):
    backend, device = place
    case = CASES[case]
    clean = make_inputs(case)
    dirty = {k: v.clone() for k, v in clean.items()}
    dirty["values"][0, 0], dirty["image_embeds"][0, 0] = poison, poison
    outputs = [
        run("prompt_guided_pool3d", case, {k: v.to(device) for k, v in x.items()}, backend) for x in (clean, dirty)
    ]
    cu_frames = cu_frames_of(case)
    for name in ("output", "relevance", "grad of values", "grad of image_embeds", "grad of text_embeds"):
        first = 1  # rows of the first video, on the first axis
        if cu_frames is not None and name != "grad of text_embeds":
            packed = name != "output" or "kernel_size" in case.window
            frames = int(cu_frames[1])
            first = (frames // 2 if name == "output" else frames) if packed else 1
        expected, actual = (x[name] for x in outputs)
        assert actual[:first].isnan().any(), name
        assert torch.equal(actual[first:], expected[first:]), name
