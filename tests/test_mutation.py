"""The suite can fail: every check of every op rejects a kernel that is wrong in one element."""

import re
from dataclasses import replace

import pytest
import torch
from cases import CASES, DTYPES, F64, OPS, make, matrix
from truth import cast, compare, run, truth

from ppllava_kernels.backends import reference

# Windows of one element have none to drop.
POOLED = [name for name in CASES if name not in ("single", "identity", "adaptive_up")]
SCORED = [name for name in CASES if name != "single"]


def drop_one_element_of_each_window(monkeypatch):
    windows = reference._windows

    def mutated(*arguments):
        axes = windows(*arguments)
        for n, (patches, inside) in enumerate(axes):
            if patches.shape[1] > 1:
                last = inside.sum(1, keepdim=True) - 1  # [O, 1]
                kept = torch.arange(patches.shape[1]) < last.clamp_min(1)
                axes[n] = (patches, inside & kept)
                break
        return axes

    monkeypatch.setattr(reference, "_windows", mutated)


def leave_one_patch_out_of_the_softmax(monkeypatch):
    relevance = reference.prompt_relevance

    def mutated(image_embeds, text_embeds, logit_scale, cu_frames):
        whole = relevance(image_embeds, text_embeds, logit_scale, cu_frames)
        if cu_frames is not None:  # made of calls without it, which are mutated
            return whole
        rest = whole.flatten(1)[:, :-1].sum(1)
        return whole / rest[:, None, None, None]

    monkeypatch.setattr(reference, "prompt_relevance", mutated)


def label(x):
    return {True: "low", False: "fp32"}[x] if isinstance(x, bool) else x.__name__ if callable(x) else str(x)


def lose_a_tenth_of_the_gradient(monkeypatch):
    """The values stay right; the scores' gradient is what is wrong."""
    pool, relevance = reference.weighted_pool3d, reference.prompt_relevance

    def damped(x):
        return None if x is None else x.detach() + 0.9 * (x - x.detach())

    monkeypatch.setattr(reference, "weighted_pool3d", lambda v, w, *rest: pool(v, damped(w), *rest))
    monkeypatch.setattr(reference, "prompt_relevance", lambda x, *rest: relevance(damped(x), *rest))


# Where the gradient is not zero: a window of one patch has no choice, a clip of one patch neither.
GUIDED = [name for name in POOLED if name not in ("ragged_one_frame", "adaptive")]


def leave_the_first_bias_out(monkeypatch):
    project = reference.weighted_project
    # Times zero: it still has a gradient.
    monkeypatch.setattr(reference, "weighted_project", lambda x, w, v, b, *rest: project(x, w, v, 0 * b, *rest))


def take_the_other_gelu(monkeypatch):
    """Its approximation by tanh, which differs by at most 5e-4."""
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))


def mutate_the_norm(monkeypatch, mutate):
    norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(torch.nn.functional, "layer_norm", lambda *arguments: norm(*mutate(*arguments)))


def leave_the_norms_bias_out(monkeypatch):
    mutate_the_norm(monkeypatch, lambda x, shape, weight, bias, eps: (x, shape, weight, 0 * bias, eps))


def forget_the_guides_part_of_the_gradient(monkeypatch):
    """Of the features: the values and all other gradients stay right."""
    mutate_the_norm(monkeypatch, lambda x, *rest: (x.detach(), *rest))


EVERY = matrix(CASES)
PROJECTED = [*((case, "fp32") for case in ("leftover", "adaptive_overlap", "ragged"))]
# Low precision cannot tell one gelu from the other, nor a softmax of one patch less.
ROUNDED = [*PROJECTED, ("leftover", "fp16"), ("leftover", "bf16")]


def of(cases):
    return [pair for pair in EVERY if pair[0] in cases]


# Of each op the wrong definitions, and the cases and dtypes in which they are wrong.
MUTATIONS = {
    "prompt_guided_project": {
        drop_one_element_of_each_window: ROUNDED,
        leave_one_patch_out_of_the_softmax: PROJECTED,
        leave_the_first_bias_out: ROUNDED,
        take_the_other_gelu: PROJECTED,
        leave_the_norms_bias_out: ROUNDED,
        forget_the_guides_part_of_the_gradient: ROUNDED,
    },
    "weighted_project": {
        drop_one_element_of_each_window: ROUNDED,
        leave_the_first_bias_out: ROUNDED,
        take_the_other_gelu: PROJECTED,
    },
    "weighted_pool3d": {
        drop_one_element_of_each_window: of(POOLED),
        lose_a_tenth_of_the_gradient: of(GUIDED),
    },
    "prompt_relevance": {
        leave_one_patch_out_of_the_softmax: of(SCORED),
        lose_a_tenth_of_the_gradient: of(GUIDED),
    },
    "prompt_guided_pool3d": {
        drop_one_element_of_each_window: of(POOLED),
        leave_one_patch_out_of_the_softmax: of(SCORED),
    },
}


def is_low(pair):
    return pair[1] != "fp32"


def precisions(op, mutation):
    return {is_low(pair) for pair in MUTATIONS[op][mutation]}


CHECKS = [(op, mutation) for op, mutations in MUTATIONS.items() for mutation in mutations]
PRECISIONS = [(*check, low) for check in CHECKS for low in (False, True) if low in precisions(*check)]


@pytest.mark.parametrize(("op", "mutation", "low"), PRECISIONS, ids=label)
def test_a_wrong_kernel_is_rejected(op, mutation, low, monkeypatch):
    """One that computes the wrong definition in the dtype of its inputs, in every case and dtype that sees it."""
    pairs = [pair for pair in MUTATIONS[op][mutation] if is_low(pair) == low]
    given = [(CASES[case], make(op, CASES[case], DTYPES[dtypes])) for case, dtypes in pairs]
    truths = [truth(op, case, tensors) for case, tensors in given]
    mutation(monkeypatch)
    wrong = [run(op, case, tensors, "reference") for case, tensors in given]
    assert [pair for pair, *each in zip(pairs, wrong, truths) if accepts(f"{op} {pair}", *each)] == []


def accepts(name, actual, right):
    try:
        compare(name, actual, right)
    except AssertionError as error:
        if re.search(r": error .* is not <= ", str(error)):
            return False
        raise  # what was compared had another shape or dtype
    return True


# Of the projector one for each op, since Triton's interpreter takes seconds for each.
EVERYWHERE = [(*check, "leftover") for check in CHECKS if not check[0].endswith("project")]
EVERYWHERE += [
    ("prompt_guided_project", forget_the_guides_part_of_the_gradient, "adaptive_overlap"),
    ("weighted_project", drop_one_element_of_each_window, "adaptive_overlap"),
]


@pytest.mark.parametrize(("op", "mutation", "case"), EVERYWHERE, ids=label)
def test_every_backend_is_rejected(op, mutation, case, place, monkeypatch):
    """By a wrong definition: what it computes is what is compared."""
    case, (backend, device) = CASES[case], place
    tensors = make(op, case)
    right = truth(op, case, tensors)
    actual = run(op, case, {name: x.to(device) for name, x in tensors.items()}, backend)
    assert accepts(f"{op} {backend}", actual, right)
    mutation(monkeypatch)
    wrong = replace(right, exact=run(op, case, cast(tensors, F64), "reference"))
    assert not accepts(f"{op} {backend}", actual, wrong)


def test_every_op_is_mutated():
    assert MUTATIONS.keys() == OPS.keys()
