"""torch.library, torch.compile, torch.export, autocast: the ops are good citizens of PyTorch."""

import pytest
import torch
from cases import CASES, LAYERS, OPS, Case, cu_frames_of, make_inputs, make_projector_inputs
from torch._dynamo import lookup_backend

import ppllava_kernels
from ppllava_kernels import (
    library,
    prompt_guided_pool3d,
    prompt_guided_project,
    prompt_relevance,
    weighted_pool3d,
    weighted_project,
)

KERNEL, ADAPTIVE = dict(kernel_size=(2, 3, 3)), dict(output_size=(2, 2, 1))
RAGGED = torch.tensor([0, 2, 6], dtype=torch.int32)


def inputs(frames=4, batch=2, device="cpu", dtype=torch.float32):
    torch.manual_seed(frames)
    values = torch.randn(batch, frames, 3, 3, 24, device=device, dtype=dtype, requires_grad=True)
    image = torch.randn(batch, frames, 3, 3, 16, device=device, dtype=dtype, requires_grad=True)
    text = torch.randn(batch, 16, device=device, dtype=dtype, requires_grad=True)
    return values, image, text


def packed(tensors):
    """Two clips of 2 and 4 frames from a batch of 2 clips of 3."""
    values, image, text = (x.detach() for x in tensors)
    return values.flatten(0, 1).requires_grad_(), image.flatten(0, 1).requires_grad_(), text.requires_grad_()


def op_arguments():
    """(name, arguments) of every registered op, dense and ragged, kernel and adaptive."""
    for cu_frames in (None, RAGGED):
        values, image, text = inputs(3) if cu_frames is None else packed(inputs(3))
        weights = torch.rand(values.shape[:-1], requires_grad=True)
        scale = torch.tensor(3.0, requires_grad=True)
        where = (cu_frames, "cpp")
        relevance = prompt_relevance(image, text, cu_frames=cu_frames).detach()
        yield "prompt_relevance", (image, text, scale, 1.0, *where)
        yield "prompt_relevance", (image, text, None, 100.0, *where)
        detached = (x.detach() for x in (image, text, scale))
        yield "prompt_relevance_backward", (relevance, relevance, *detached, 1.0, *where)
        for window in ((2, 3, 3), (2, 3, 3), ()), ((), (), (2, 2, 1)):
            yield "weighted_pool3d", (values, weights, *window, 0.01, *where)
            yield "weighted_pool3d", (values, None, *window, 0.01, *where)
            yield "prompt_guided_pool3d", (values, image, text, scale, 1.0, *window, 0.01, *where)
            detached = values.detach(), weights.detach()
            grad = library.ops.weighted_pool3d(*detached, *window, 0.01, *where)
            arguments = (grad, *detached, *window, 0.01, *where)
            yield "weighted_pool3d_backward", (*arguments, True, True)
            yield "weighted_pool3d_backward", (*arguments, False, True)


def projector(frames=4, ragged=False):
    """Inputs of prompt_guided_project with their names, and weights; of two clips of 2 and 4 frames where ragged."""
    case = Case((6, 3, 3) if ragged else (2, frames, 3, 3), (5, 7), cu_frames=(0, 2, 6) if ragged else None)
    return {name: x.requires_grad_() for name, x in make_projector_inputs(case, seed=frames).items()}


MATRICES = ("guide_weight", "linear_1_weight")


def projector_arguments():
    """(name, arguments) of the projector's registered ops, with and without what is optional."""
    for cu_frames in (None, RAGGED):
        x = projector(3, ragged=cu_frames is not None)
        if cu_frames is None:  # transposed views, as CLIP's own checkpoints have; their gradients are contiguous
            x |= {name: x[name].detach().t().contiguous().t().requires_grad_() for name in MATRICES}
        y = {name: v.detach() for name, v in x.items()}
        where = (cu_frames, "cpp")
        for norm, scale in (("norm_weight", "logit_scale"), (None, None)):
            # Optional tensors are there or not.
            guide = ("features", "text_embeds", scale, 1.0, norm, norm and "norm_bias", 1e-5, "guide_weight")
            yield "guide_relevance", (*(named(x, name) for name in guide), *where)
            detached = *(named(y, name) for name in guide), *where
            outputs = library.ops.guide_relevance(*detached)
            for need in (True, True, norm is not None, True), (False,) * 4:
                yield "guide_relevance_backward", (outputs[0], *outputs, *detached, *need)
        for window in ((2, 3, 3), (2, 3, 3), ()), ((), (), (2, 2, 1)):
            for weights, bias in (("weights", "linear_1_bias"), (None, None)):
                inputs = ("features", weights, "linear_1_weight", bias)
                yield "hidden_pool3d", (*(named(x, name) for name in inputs), *window, 0.01, *where)
                detached = (*(named(y, name) for name in inputs), *window, 0.01, *where)
                grad = library.ops.hidden_pool3d(*detached)
                for need in (True, weights is not None, True, bias is not None), (False,) * 4:
                    yield "hidden_pool3d_backward", (grad, *detached, *need)


def named(tensors, x):
    return tensors[x] if isinstance(x, str) else x


@pytest.mark.parametrize(
    ("op", "arguments"),
    [pytest.param(*x, id=f"{x[0]}-{n}") for n, x in enumerate((*op_arguments(), *projector_arguments()))],
)
def test_opcheck(op, arguments):
    # Without the NaN fill: opcheck wants two runs to be equal, and unneeded outputs are empty.
    ragged_kernel = arguments[arguments.index("cpp") - 1] is not None and (2, 3, 3) in arguments
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not ragged_kernel:  # the number of pooled frames depends on data, which aot_dispatch cannot trace by default
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(library.ops, op).default, arguments, test_utils=tests)


def results(function, tensors):
    """Outputs and gradients."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


def counting(graphs, compiler):
    """A backend of torch.compile that keeps the graphs which a backend of that name has compiled.

    One that makes a constant of a float does not return: Dynamo starts again (TensorifyScalarRestartAnalysis).
    """

    def compile_and_count(graph, example_inputs):
        compiled = lookup_backend(compiler)(graph, example_inputs)
        graphs.append(graph)
        return compiled

    return compile_and_count


@pytest.mark.parametrize("backend", ["cpp", "reference", None])
@pytest.mark.parametrize("window", [KERNEL, ADAPTIVE], ids=["kernel", "adaptive"])
def test_compile_fullgraph_dynamic(window, backend):
    """One graph for any number of frames, forward and backward: nothing is compiled again for a new T."""
    graphs = []

    def function(values, image, text):
        pooled, relevance = prompt_guided_pool3d(
            values, image, text, return_relevance=True, backend=backend, logit_scale=3.0, **window
        )
        return pooled + 2 * weighted_pool3d(values, relevance, backend=backend, **window)

    torch._dynamo.reset()
    # Inductor has nothing to add to the reference but minutes.
    compiler = counting(graphs, "aot_eager" if backend == "reference" else "inductor")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=compiler)
    for frames in (4, 6, 7):
        for actual, expected in zip(results(compiled, inputs(frames)), results(function, inputs(frames))):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # The reference has one graph for outputs that divide T and one for those that do not.
    assert len(graphs) == (2 if backend == "reference" and window is ADAPTIVE else 1)


def test_compile_keeps_one_opaque_node_in_each_direction():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def record(graph, example_inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch._dynamo.reset()
    function = torch.compile(
        lambda *x: prompt_guided_pool3d(*x, backend="cpp", **KERNEL),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=record, bw_compiler=record),
    )
    function(*inputs()).sum().backward()
    forward, backward = ([name for name in names if "ppllava_kernels" in name] for names in seen)
    assert forward == ["ppllava_kernels.prompt_guided_pool3d.default"]
    assert backward == [
        "ppllava_kernels.weighted_pool3d_backward.default",
        "ppllava_kernels.prompt_relevance_backward.default",
    ]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("window", [KERNEL, ADAPTIVE, dict(kernel_size=(1, 3, 3))], ids=["kernel", "adaptive", "frame"])
def test_compile_ragged(window, backend):
    """With kernel_size the number of pooled frames depends on the values of cu_frames."""
    function = lambda *x: prompt_guided_pool3d(*x, cu_frames=RAGGED, backend=backend, **window)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for a, e in zip(results(compiled, packed(inputs(3))), results(function, packed(inputs(3)))):
        torch.testing.assert_close(a, e)


def project(cu_frames=None, backend="cpp", **window):
    """prompt_guided_project, its relevance, and weighted_project of that, as a function of tensors in order."""

    def function(*tensors):
        x = dict(zip(OPS["prompt_guided_project"], tensors))
        options = dict(cu_frames=cu_frames, backend=backend, temperature=0.3, **window)
        tokens, relevance = prompt_guided_project(**x, norm_eps=1e-5, return_relevance=True, **options)
        layers = {name: x[name] for name in LAYERS}
        return tokens + 2 * weighted_project(x["features"], relevance.square(), **layers, **options)

    return function


def projected(frames=4, ragged=False):
    x = projector(frames, ragged)
    return tuple(x[name] for name in OPS["prompt_guided_project"])


@pytest.mark.parametrize(
    ("window", "compiler"), [(KERNEL, "inductor"), (ADAPTIVE, "aot_eager")], ids=["kernel", "adaptive"]
)
def test_compile_the_projector(window, compiler):
    """One graph for any number of frames, forward and backward; products and gradients of all weights, transposed."""
    graphs = []

    def transposed(frames):
        pairs = zip(OPS["prompt_guided_project"], projected(frames))
        return [x.detach().t().contiguous().t().requires_grad_() if name in MATRICES else x for name, x in pairs]

    function = project(**window)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting(graphs, compiler))
    for frames in (4, 7):
        for actual, expected in zip(results(compiled, transposed(frames)), results(function, transposed(frames))):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("window", "backend"),
    [(KERNEL, "cpp"), (ADAPTIVE, "cpp"), (dict(kernel_size=(1, 3, 3)), "triton")],
    ids=["cpp-kernel", "cpp-adaptive", "triton-frame"],
)
def test_compile_the_projector_ragged(window, backend):
    function = project(RAGGED, backend, **window)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, e in zip(results(compiled, projected(ragged=True)), results(function, projected(ragged=True))):
        torch.testing.assert_close(a, e)


def test_compile_the_projector_under_autocast():
    """As without torch.compile: products in bfloat16, scores in float32, gradients in the dtype of the weights."""
    function = project(**KERNEL)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = results(compiled, projected()), results(function, projected())
    assert actual[0].dtype == torch.bfloat16
    for name, a, e in zip(("tokens", *OPS["prompt_guided_project"]), actual, expected):
        assert a.dtype == (torch.bfloat16 if name == "tokens" else torch.float32), name
        torch.testing.assert_close(a, e)


def test_compile_keeps_the_projector_in_two_ops():
    """And the second layer, a product that the compiler may fuse with what follows."""
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def record(graph, example_inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    def function(*tensors):
        x = dict(zip(OPS["prompt_guided_project"], tensors))
        return prompt_guided_project(**x, norm_eps=1e-5, backend="cpp", **KERNEL)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    compiled(*projected()).sum().backward()
    forward, backward = ([name.split(".")[1] for name in names if "ppllava_kernels" in name] for names in seen)
    assert forward == ["guide_relevance", "hidden_pool3d"]
    assert backward == ["hidden_pool3d_backward", "guide_relevance_backward"]
    assert sum("addmm" in name for name in seen[0]) == 1


def test_compile_finds_a_bad_cu_frames():
    """Its values are checked when the compiled function runs, not only when it is traced."""
    function = lambda v, cu: weighted_pool3d(v, None, cu_frames=cu, backend="cpp", **ADAPTIVE)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    values = packed(inputs(3))[0]
    torch.testing.assert_close(compiled(values, RAGGED), function(values, RAGGED))
    with pytest.raises(ValueError, match="cu_frames must end at F = 6, the packed frames, got 9"):
        compiled(values, torch.tensor([0, 2, 9], dtype=torch.int32))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_export(backend):
    class Pool(torch.nn.Module):
        def forward(self, values, image, text):
            return prompt_guided_pool3d(values, image, text, backend=backend, **KERNEL)

    frames = torch.export.Dim("frames", min=4, max=64)
    shapes = ({1: frames}, {1: frames}, None)
    program = torch.export.export(Pool(), tuple(x.detach() for x in inputs(4)), dynamic_shapes=shapes)
    for n in (4, 9):
        tensors = [x.detach() for x in inputs(n)]
        torch.testing.assert_close(program.module()(*tensors), Pool()(*tensors))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_export_the_projector(backend):
    class Project(torch.nn.Module):
        def forward(self, features, *rest):
            return project(backend=backend, **KERNEL)(features, *rest)

    # Of the 2 frames of each window: with any number of frames PyTorch's linear layer, after a pooling, has a guard.
    frames = 2 * torch.export.Dim("windows", min=2, max=32)
    rest = tuple(None for _ in projected()[1:])
    program = torch.export.export(
        Project(), tuple(x.detach() for x in projected(4)), dynamic_shapes=({1: frames}, rest)
    )
    for n in (4, 10):
        tensors = [x.detach() for x in projected(n)]
        torch.testing.assert_close(program.module()(*tensors), Project()(*tensors))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_leaves_scores_alone(backend):
    """A blanket cast to bfloat16 would round the weights by up to 0.2 in the exponent at temperature 0.01."""
    values, weights = torch.randn(1, 4, 3, 3, 8), torch.rand(1, 4, 3, 3)
    image, text = torch.randn(1, 4, 3, 3, 16), torch.randn(1, 16)
    for low in (values, values.bfloat16()):
        expected = weighted_pool3d(low, weights, backend=backend, **KERNEL)
        relevance = prompt_relevance(image, text, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(weighted_pool3d(low, weights, backend=backend, **KERNEL), expected)
            assert torch.equal(prompt_relevance(image, text, backend=backend), relevance)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_leaves_the_projectors_scores_alone(backend):
    """Features and weights are cast, scores of another guide are not."""
    x = {name: v.detach() for name, v in projector().items()}
    layers = {name: x[name] for name in LAYERS}
    low = {name: v.bfloat16() for name, v in layers.items()}
    expected = weighted_project(x["features"].bfloat16(), x["weights"], **low, backend=backend, **KERNEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = weighted_project(x["features"], x["weights"], **layers, backend=backend, **KERNEL)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_meta_tensors_have_shapes():
    values, image, text = (x.to("meta") for x in inputs())
    pooled, relevance = prompt_guided_pool3d(values, image, text, return_relevance=True, backend="reference", **KERNEL)
    assert pooled.shape == (2, 2, 1, 1, 24)
    assert relevance.shape == (2, 4, 3, 3)


def test_meta_tensors_have_shapes_of_the_projector():
    tokens = project(backend="reference", **KERNEL)(*(x.to("meta") for x in projected()))
    assert tokens.shape == (2, 2, 1, 1, 7)


def test_module_in_a_compiled_model():
    module = torch.nn.Sequential(torch.nn.Linear(24, 24), ppllava_kernels.WeightedPool3d((2, 3, 3)))
    values = inputs()[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(values), module(values))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
class TestOnAGpu:
    @pytest.mark.parametrize("case", ["divisible", "overlap", "adaptive_overlap", "ragged", "ragged_adaptive"])
    def test_cuda_graph(self, case, backend):
        """Captured once, replayed on other numbers in the same memory; the scale is a tensor on the device, too."""
        case = CASES[case]
        first, second = (
            {k: v.cuda() for k, v in make_inputs(case, seed=seed).items() if k != "weights"} for seed in (0, 1)
        )
        cu_frames = cu_frames_of(case)

        def call():
            leaves = {k: v.detach().requires_grad_() for k, v in first.items()}
            pooled, relevance = prompt_guided_pool3d(
                **leaves, cu_frames=cu_frames, return_relevance=True, backend=backend, **case.window
            )
            grads = torch.autograd.grad(pooled.square().sum() + relevance.square().sum(), list(leaves.values()))
            return pooled.detach(), relevance.detach(), *grads

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for name, x in second.items():
            first[name].copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        for actual, expected in zip(captured, call()):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("window", [KERNEL, ADAPTIVE], ids=["kernel", "adaptive"])
    def test_compile_fullgraph(self, window, backend):
        function = lambda *x: prompt_guided_pool3d(*x, backend=backend, **window)  # noqa: E731
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True)
        for frames in (4, 7):
            expected = results(function, inputs(frames, device="cuda"))
            for a, e in zip(results(compiled, inputs(frames, device="cuda")), expected):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    def test_two_streams_at_once(self, backend):
        """Calls share no state: each cooperative grid has its own barrier and its own workspace."""
        tensors = {k: v.cuda() for k, v in make_inputs(CASES["divisible"]).items() if k != "weights"}
        expected = prompt_guided_pool3d(**tensors, backend=backend, **KERNEL)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        pooled = []
        for n in range(200):
            with torch.cuda.stream(streams[n % 2]):
                pooled.append(prompt_guided_pool3d(**tensors, backend=backend, **KERNEL))
        torch.cuda.synchronize()
        assert all(torch.equal(x, expected) for x in pooled)


@pytest.mark.gpu
def test_the_best_backend_on_a_gpu_is_cuda():
    assert ppllava_kernels.compatible_backends(torch.ones(1, device="cuda")) == ["cuda", "triton", "reference"]


@pytest.mark.gpu
def test_too_many_channels_for_cuda():
    image, text = torch.randn(1, 1, 1, 1, 60_000, device="cuda"), torch.randn(1, 60_000, device="cuda")
    with pytest.raises(RuntimeError, match="backend='cuda' could not run its kernel: image_embeds has more channels"):
        prompt_relevance(image, text, backend="cuda")


def test_what_runs_between_two_graphs_is_left_alone():
    """PyTorch breaks a graph where a shape depends on data. The op that it then calls is not compiled in pieces."""
    from torch._dynamo.utils import counters

    module = ppllava_kernels.PromptGuidedProjector(
        torch.nn.LayerNorm(7), torch.nn.Linear(7, 5, bias=False), torch.nn.Linear(7, 12), torch.nn.Linear(12, 9),
        **KERNEL, backend="cpp",
    )  # fmt: skip
    tensors = torch.randn(6, 3, 3, 7), torch.randn(2, 5), RAGGED
    expected = module(*tensors)
    for capture in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=capture):
            actual = torch.compile(module, backend="eager")(*tensors)
        torch.testing.assert_close(actual, expected)
        reasons = " ".join(counters["graph_break"])
        assert "_C" not in reasons, reasons
        assert [reason.partition("\n")[0] for reason in counters["graph_break"]] == ["Dynamic shape operator"] * (
            not capture
        )
