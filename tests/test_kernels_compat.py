"""Private names of PyTorch: each in compat.py, imported and called here, and none anywhere else."""

import re
from pathlib import Path

import pytest
import torch

import ppllava_kernels
from ppllava_kernels import compat

PACKAGE = Path(ppllava_kernels.__file__).parent
PRIVATE = re.compile(
    r"\b(torch(\.\w+)*|forward_ad|nn|F)\._[A-Za-z]\w*|from torch[\w.]*\._|from torch[\w.]* import .*\b_[a-z]"
)


def test_no_other_file_uses_one():
    found = [
        f"{path.relative_to(PACKAGE)}:{n}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "compat.py"
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert found == []
    assert PRIVATE.search("        if torch._C._any_requires_grad(x):")
    assert PRIVATE.search("from torch._subclasses import FakeTensor")


def test_every_name_is_used():
    text = "".join(path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "compat.py")
    assert [name for name in compat.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_dispatch_keys():
    seen = {}

    with torch.library._scoped_library("ppllava_compat_test", "FRAGMENT") as library:
        library.define("keys(Tensor x) -> Tensor")
        library.impl("keys", lambda keys, x: seen.setdefault("keys", keys) and x.clone(), "Autograd", with_keyset=True)
        torch.ops.ppllava_compat_test.keys(torch.ones(1))
    keys = seen["keys"]
    assert compat.is_plain(keys)
    assert compat.keys_below_autograd(keys).raw_repr() & keys.raw_repr() != keys.raw_repr()
    with compat.below_autograd():
        x = torch.ones(1, requires_grad=True) * 2
    assert not x.requires_grad


def test_gradients_that_are_asked_for():
    leaf = torch.ones(1, requires_grad=True)
    assert compat.any_requires_grad(torch.ones(1), None, "cpp", leaf)
    assert not compat.any_requires_grad(torch.ones(1), None, "cpp")
    with torch.autograd.forward_ad.dual_level():
        assert compat.in_forward_mode()
    assert not compat.in_forward_mode()
    inside = []
    torch.func.grad(lambda x: inside.append(compat.in_transform()) or x.sum())(torch.ones(1))
    assert inside == [True]
    assert not compat.in_transform()


def test_fake_tensors():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert type(torch.empty(1)) is compat.FakeTensor


def test_a_function_that_dynamo_leaves_alone():
    """And what it calls, too."""
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def called(x):
        return x + 1

    def seen(x):
        return called(x)

    @compat.hide_from_dynamo
    def hidden(x):
        return called(x)

    torch._dynamo.reset()
    torch.compile(seen, backend=count)(torch.ones(1))
    assert len(graphs) == 1
    torch.compile(hidden, backend=count)(torch.ones(1))
    assert len(graphs) == 1


@pytest.mark.gpu
def test_cuda():
    assert compat.driver_version() >= 11000
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert compat.current_raw_stream(torch.cuda.current_device()) == stream.cuda_stream
