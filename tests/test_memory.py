"""No kernel reads or writes outside of what it is given."""

from itertools import accumulate

import pytest
import torch
from cases import CASES, LAYOUTS, OPS, Case, cu_frames_of, make_inputs, make_projector_inputs, sliced
from torch.profiler import ProfilerActivity, profile
from truth import cast, run

from ppllava_kernels import prompt_guided_pool3d, prompt_relevance
from ppllava_kernels.backends import products

SENTINEL = 42.0
PROJECTOR = ("prompt_guided_project", "weighted_project")
SMALL = ("adaptive_up", "ragged_one_frame")


def make(op, case, device="cpu"):
    tensors = (make_projector_inputs if op in PROJECTOR else make_inputs)(case)
    return {name: tensors[name].to(device) for name in OPS[op]}


def with_ops(*cases):
    """(op, case) parameters; of the projector, which takes longest in the interpreter, the small ones."""
    return [(op, case) for op in OPS for case in (SMALL if op in PROJECTOR else cases)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Of the projector: a frame, and some of its channels."""
    monkeypatch.setattr(products, "TILE", {"cpu": (6, 40), "cuda": (6, 40)})


@pytest.mark.parametrize(("op", "case"), with_ops("leftover", "gaps", "ragged", "adaptive_overlap", "odd_channels"))
def test_nothing_around_the_inputs_counts(op, case, place, small_tiles):
    """Inputs as views into buffers of NaN: one element read too many would show in values or gradients."""
    backend, device = place
    tensors = make(op, CASES[case], device)
    views = {k: v if k == "logit_scale" else sliced(v) for k, v in tensors.items()}
    expected, actual = run(op, CASES[case], tensors, backend), run(op, CASES[case], views, backend)
    for name, x in expected.items():
        assert not x.isnan().any()
        torch.testing.assert_close(actual[name], x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["permuted", "sliced", "expanded"])
@pytest.mark.parametrize("op", OPS)
def test_inputs_are_only_read(op, layout, place, small_tiles):
    """Forward and backward, of views as well: what is around them and what they share stays, too."""
    backend, device = place
    case = Case((2, 2, 1, 3), (5, 7), dict(kernel_size=(2, 1, 2), stride=1))
    tensors = make(op, case, device)
    views = {name: LAYOUTS[layout](x) if x.dim() > 2 else x for name, x in tensors.items()}
    before = {name: storage_of(x).clone() for name, x in views.items()}
    run(op, case, views, backend)
    for name, x in views.items():
        assert torch.equal(storage_of(x).view(torch.int32), before[name].view(torch.int32)), name


def storage_of(x):
    """All elements of the buffer that x is a view into."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pytest.mark.parametrize("name", ["norm_weight", "norm_bias", "linear_1_bias", "linear_2_bias"])
def test_vectors_of_any_stride(name, backend):
    case = Case((1, 2, 1, 2), (5, 7), dict(kernel_size=(1, 1, 2)))
    tensors = make("prompt_guided_project", case, torch.get_default_device())
    strided = torch.stack((tensors[name], tensors[name] + 9), 1)[:, 0]
    expected = run("prompt_guided_project", case, tensors | {name: strided.contiguous()}, backend)
    actual = run("prompt_guided_project", case, tensors | {name: strided}, backend)
    for key, x in expected.items():
        torch.testing.assert_close(actual[key], x)


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
        # Sums, which kernels add to.
        zeros = lambda x, *shape, dtype=None: self.new(x, *shape, dtype=dtype).zero_()  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "new_zeros", zeros)
        monkeypatch.setattr(torch, "zeros_like", lambda x, dtype=None: zeros(x, x.shape, dtype=dtype))
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
@pytest.mark.parametrize(
    ("op", "case"), with_ops("leftover", "gaps", "ragged", "adaptive_overlap", "odd_channels", "single")
)
def test_nothing_around_the_outputs_is_written(op, case, dtype, place, small_tiles, monkeypatch):
    backend, device = place
    tensors = cast(make(op, CASES[case], device), dtype)
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


# T*H*W*D' are 16384 elements; one of tiles of 8 patches and 32 channels has 256. C, V and D are 8.
LARGE = Case((1, 4, 4, 4), (8, 8), dict(kernel_size=(2, 2, 2)))
WIDE = 256


@pytest.fixture
def wide():
    """Inputs of the projector whose D' is far larger than all other widths."""
    tensors = make_projector_inputs(LARGE)
    generator = torch.Generator().manual_seed(0)
    shapes = dict(linear_1_weight=(WIDE, 8), linear_1_bias=(WIDE,), linear_2_weight=(8, WIDE))
    return tensors | {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def allocations(op, tensors, backend):
    """(largest allocation, most bytes at a time) of a forward and a backward, PyTorch's own and those in C++."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run(op, LARGE, tensors, backend)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(sizes), max(accumulate(sizes))


@pytest.mark.parametrize(
    ("op", "backend"),
    [("prompt_guided_project", "cpp"), ("weighted_project", "cpp"), ("prompt_guided_project", "triton")],
)
def test_the_projector_never_writes_its_first_layer(op, backend, wide, monkeypatch):
    """All that a call allocates, forward and backward, is less than T*H*W*D' elements, at any time together."""
    monkeypatch.setattr(products, "TILE", {"cpu": (8, 32)})
    whole = 4 * 4 * 4 * WIDE * wide["features"].element_size()
    largest, together = allocations(op, wide, backend)
    assert largest < whole / 4
    assert together < whole
    assert allocations(op, wide, "reference")[0] >= whole, "it would not be seen"


def test_a_tile_is_all_of_the_first_layer_that_there_is(wide, monkeypatch):
    """The largest tile is the setting, not the clip."""
    sizes = {}
    for rows in (8, 32, 1024):
        monkeypatch.setattr(products, "TILE", {"cpu": (rows, WIDE)})
        sizes[rows] = allocations("weighted_project", wide, "cpp")[0]
    element = wide["features"].element_size()
    assert sizes[32] == 32 * WIDE * element
    assert sizes[8] < sizes[32] < sizes[1024] == 4 * 4 * 4 * WIDE * element
