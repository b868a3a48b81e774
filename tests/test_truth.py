"""What all backends are compared with is the reference's own result, and of no other inputs."""

import os
from dataclasses import replace

import pytest
import torch
from cases import CASES, DTYPES, LAYOUTS, OPS, Case, make
from truth import FOLDER, digest, measure, truth

CASE = Case((1, 2, 2, 2), (3, 5), dict(kernel_size=(1, 2, 1)))


@pytest.mark.parametrize("op", OPS)
def test_a_truth_is_measured_once(op, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    tensors = make(op, CASE, DTYPES["bf16"])
    for _ in range(2):
        found, expected = truth(op, CASE, tensors), measure(op, CASE, tensors)
        assert (found.unavoidable, found.dtypes) == (expected.unavoidable, expected.dtypes)
        assert all(error > 0 for error in found.unavoidable.values())
        assert found.exact.keys() == expected.exact.keys()
        for name, x in expected.exact.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(found.exact[name], x, rtol=0, atol=0)
    assert len(list(tmp_path.iterdir())) == 1


def test_each_input_has_its_own():
    op, tensors = "prompt_guided_pool3d", make("prompt_guided_pool3d", CASES["ragged"])
    tensors = {name: tensors[name] for name in OPS[op]}
    given = op, CASES["ragged"], tensors, {}
    others = [("weighted_pool3d", *given[1:]), (*given[:3], {"temperature": 0.5})]
    for change in ({"window": {"kernel_size": (1, 3, 2)}}, {"cu_frames": (0, 3, 5, 9)}):
        others.append((op, replace(CASES["ragged"], **change), tensors, {}))
    for name, x in tensors.items():
        changed = x.clone()
        changed.view(-1)[-1] = changed.view(-1)[-1].nextafter(torch.tensor(torch.inf))
        for other in (changed, x.double(), x[None], None):
            others.append((op, CASES["ragged"], tensors | {name: other}, {}))
    assert len({digest(*each) for each in (given, *others)}) == 1 + len(others)


def test_layouts_share_one(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    tensors = make("weighted_pool3d", CASE)
    for layout in ("contiguous", "permuted", "sliced"):
        truth("weighted_pool3d", CASE, tensors | {"values": LAYOUTS[layout](tensors["values"])})
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="needs a worker of pytest-xdist; run pytest -n 1")
def test_a_worker_has_one_thread():
    assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)
