"""PromptGuidedProjector on the modules of a model, plain or not."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from tiny import close
from torch import nn
from torch.nn.utils import parametrizations, prune

from ppllava_kernels import PromptGuidedProjector, modules, prompt_guided_pool3d, weighted_pool3d

V, C, HIDDEN, D = 12, 10, 24, 16
WINDOW = dict(kernel_size=(2, 3, 3))
F64 = torch.float64
CU_FRAMES = torch.tensor([0, 3, 8], dtype=torch.int32)


def build(dtype=F64, **changes):
    torch.manual_seed(0)
    parts = dict(norm=nn.LayerNorm(V), guide=nn.Linear(V, C, bias=False))
    parts |= dict(linear_1=nn.Linear(V, HIDDEN), linear_2=nn.Linear(HIDDEN, D))
    options = dict(logit_scale=nn.Parameter(torch.tensor(7.0)), temperature=0.02, return_relevance=True)
    return PromptGuidedProjector(**(parts | options | WINDOW | changes)).to(dtype)


def inputs(dtype=F64, ragged=False):
    generator = torch.Generator().manual_seed(1)
    shape = (8, 6, 6, V) if ragged else (2, 4, 6, 6, V)
    features = torch.randn(shape, generator=generator, dtype=F64)
    return features.to(dtype), torch.randn(2, C, generator=generator, dtype=F64).to(dtype)


def one_after_another(projector, features, text_embeds, cu_frames=None):
    """The modules in the original's order: both layers, then the pooling."""
    values = projector.linear_2(projector.act(projector.linear_1(features)))
    options = dict(cu_frames=cu_frames, temperature=projector.temperature, backend="reference")
    options |= {name: getattr(projector, name) for name in ("kernel_size", "stride", "output_size")}
    if projector.guide is None:
        return weighted_pool3d(values, None, **options), None
    embeds = projector.guide(features if projector.norm is None else projector.norm(features))
    options |= dict(logit_scale=projector.logit_scale, return_relevance=True)
    return prompt_guided_pool3d(values, embeds, text_embeds, **options)


@pytest.fixture
def ops(monkeypatch):
    """Names of the ops that run."""
    names = ("prompt_guided_project", "weighted_project", "prompt_relevance", "weighted_pool3d")
    calls = []

    def record(name):
        op = getattr(modules, name)
        monkeypatch.setattr(modules, name, lambda *args, **kwargs: calls.append(name) or op(*args, **kwargs))

    for name in names:
        record(name)
    return calls


ONE = ["prompt_guided_project"]
GUIDE_ALONE = ["prompt_relevance", "weighted_project"]
ALL = ["prompt_relevance", "weighted_pool3d"]


def check(projector, expected=None, ragged=False):
    """Equal to `expected`, or to itself one module after another."""
    cu_frames = CU_FRAMES if ragged else None
    features, text = inputs(ragged=ragged)
    actual = projector(features, text, cu_frames)
    expected = one_after_another(expected or projector, features, text, cu_frames)
    for one, other in zip(actual, expected):
        assert one.dtype == F64
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["cpp", "reference", None])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "ragged"])
@pytest.mark.parametrize(
    "window", [WINDOW, WINDOW | dict(stride=(1, 2, 1)), dict(kernel_size=None, output_size=(2, 1, 3))]
)
def test_the_op_is_the_modules(window, ragged, backend, ops):
    check(build(**window, backend=backend), ragged=ragged)
    assert ops == ONE


@pytest.mark.parametrize(
    ("changes", "called"),
    [
        (dict(norm=None), GUIDE_ALONE),
        (dict(norm=nn.LayerNorm(V, elementwise_affine=False)), ONE),
        (dict(norm=nn.LayerNorm(V, bias=False, eps=0.5)), ONE),
        (dict(norm=nn.RMSNorm(V, eps=1e-6)), GUIDE_ALONE),
        (dict(guide=nn.Linear(V, C)), GUIDE_ALONE),
        (dict(linear_1=nn.Linear(V, HIDDEN, bias=False), linear_2=nn.Linear(HIDDEN, D, bias=False)), ONE),
        (dict(linear_1=nn.Sequential(nn.Linear(V, HIDDEN), nn.Tanh())), ALL),
        (dict(logit_scale=30.0), ONE),
    ],
)
def test_other_parts(changes, called, ops):
    check(build(**changes))
    assert ops == called


def test_without_guide(ops):
    projector = build(norm=None, guide=None, return_relevance=False)
    features, _ = inputs()
    expected = one_after_another(projector, features, None)[0]
    torch.testing.assert_close(projector(features), expected, rtol=0, atol=1e-12)
    assert ops == ["weighted_project"]


def test_another_activation(ops):
    for act in (nn.SiLU(), nn.GELU(approximate="tanh")):
        projector = build()
        projector.act = act
        check(projector)
    assert ops == ALL * 2


# Modules that are not what their type and weights say: each change, the ops that run, whether it changes the result.


class Curved(nn.Linear):
    def forward(self, x):
        return super().forward(x).sin()


class CurvedNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).sin()


class Quantised(torch.Tensor):
    """As torchao's: nn.Linear stays, its weight is a tensor of another kind, which says what a product is."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor).round(decimals=1) if func is F.linear else result


def subclass(projector, name):
    getattr(projector, name).__class__ = CurvedNorm if name == "norm" else Curved


def lora(projector, name):
    peft = pytest.importorskip("peft", reason="needs PEFT; pip install peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=8, target_modules=[name]), projector)
    nn.init.normal_(getattr(projector, name).lora_B["default"].weight)
    projector.double()


def forward_hook(projector, name):
    getattr(projector, name).register_forward_hook(lambda module, args, output: output.sin())


def forward_pre_hook(projector, name):
    getattr(projector, name).register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def accelerate_hook(projector, name):
    class Halve(ModelHook):
        def post_forward(self, module, output):
            return output * output.abs()

    add_hook_to_module(getattr(projector, name), Halve())


def own_forward(projector, name):
    layer = getattr(projector, name)
    layer.forward = lambda x: type(layer).forward(layer, x).cos()


def parametrized(projector, name):
    parametrizations.orthogonal(getattr(projector, name))


def pruned(projector, name):
    prune.random_unstructured(getattr(projector, name), "weight", amount=0.5)


def quantised(projector, name):
    layer = getattr(projector, name)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised), requires_grad=False)


CHANGES = (subclass, lora, forward_hook, forward_pre_hook, accelerate_hook, own_forward)
CHANGES += (parametrized, pruned, quantised)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change, name)
        for change in CHANGES
        for name in ("norm", "guide", "linear_1", "linear_2")
        if name != "norm" or change not in (lora, parametrized, quantised)
    ],
)
def test_a_changed_module_computes_what_it_computes(change, name, ops):
    projector, plain = build(), build()
    change(projector, name)
    features, text = inputs()
    if name == "linear_2":  # sees the pooled patches
        pooled, relevance = projector(features, text)
        hidden = projector.act(projector.linear_1(features))
        expected = weighted_pool3d(hidden, relevance, temperature=0.02, **WINDOW)
        torch.testing.assert_close(pooled, projector.linear_2(expected), rtol=0, atol=1e-12)
    else:
        check(projector)
    assert ops == (ALL if name.startswith("linear") else GUIDE_ALONE)
    (pooled, relevance), (before, relevance_before) = projector(features, text), plain(features, text)
    assert (pooled - before).abs().max() > 1e-4
    assert torch.allclose(relevance, relevance_before) == name.startswith("linear")


@pytest.mark.parametrize("name", ["norm", "guide", "linear_1", "act", "linear_2"])
def test_a_backward_hook_runs(name):
    projector, seen = build(), []
    features, text = inputs()
    getattr(projector, name).register_full_backward_hook(lambda module, *grads: seen.append(module))
    projector(features.requires_grad_(), text)[0].square().sum().backward()
    assert seen == [getattr(projector, name)]


def test_lora_that_is_merged_is_a_plain_layer_again(ops):
    projector = build()
    lora(projector, "linear_1")
    features, text = inputs()
    expected, _ = projector(features, text)
    projector.linear_1.merge()
    projector.linear_1 = projector.linear_1.get_base_layer()
    ops.clear()
    torch.testing.assert_close(projector(features, text)[0], expected, rtol=0, atol=1e-12)
    assert ops == ONE


def test_state_dict():
    layers = ["norm.weight", "norm.bias", "guide.weight", "linear_1.weight", "linear_1.bias"]
    layers += ["linear_2.weight", "linear_2.bias"]
    assert set(build().state_dict()) == {"logit_scale", *layers}
    assert set(build(logit_scale=torch.tensor(3.0)).state_dict()) == {"logit_scale", *layers}
    assert set(build(logit_scale=3.0).state_dict()) == {*layers}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_training_step_reaches_every_parameter(backend):
    projector = build(backend=backend)
    features, text = (x.requires_grad_() for x in inputs())

    def grads(run):
        pooled, relevance = run(features, text)
        loss = pooled.square().sum() + (relevance * relevance.detach().cos()).sum()
        named = dict(projector.named_parameters(), features=features, text=text)
        return dict(zip(named, torch.autograd.grad(loss, list(named.values()))))

    expected = grads(lambda *x: one_after_another(projector, *x))
    for name, grad in grads(projector).items():
        assert grad.any(), name
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("changed", [None, "guide", "linear_1"])
def test_compile(changed):
    projector = build(torch.float32, return_relevance=False)
    if changed:
        subclass(projector, changed)
    features, text = inputs(torch.float32)
    compiled = torch.compile(projector, fullgraph=True, backend="aot_eager")
    expected, actual = projector(features, text), compiled(features, text)
    close(actual, expected, 1e-5)
    expected, actual = (torch.autograd.grad(x.square().sum(), list(projector.parameters())) for x in (expected, actual))
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export_has_the_ops(strict):
    projector = build(torch.float32, return_relevance=False).requires_grad_(False)
    graph = torch.export.export(projector, inputs(torch.float32), strict=strict)
    assert "hidden_pool3d" in str(graph.graph)
    close(graph.module()(*inputs(torch.float32)), projector(*inputs(torch.float32)), 1e-6)


def test_autocast():
    projector = build(torch.float32)
    features, text = inputs(torch.float32)
    expected, _ = projector(features, text)
    for name in (None, "linear_1"):
        if name:
            projector.linear_1.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled, relevance = projector(features, text)
        assert (pooled.dtype, relevance.dtype) == (torch.bfloat16, torch.float32)
        assert (pooled - expected).norm() < 0.05 * expected.norm()


def test_copies():
    projector = build()
    features, text = inputs()
    file = io.BytesIO()
    torch.save(projector, file)
    file.seek(0)
    for other in (copy.deepcopy(projector), torch.load(file, weights_only=False)):
        assert torch.equal(other(features, text)[0], projector(features, text)[0])
        assert other.linear_1 is not projector.linear_1


def test_repr():
    assert "kernel_size=(2, 3, 3), temperature=0.02" in repr(build())
