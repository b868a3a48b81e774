"""The suite can fail: with a definition that is wrong in one element, every check of every op rejects every backend."""

import pytest
import torch
from cases import CASES, OPS, check, make_inputs, make_projector_inputs

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
    return x.__name__ if callable(x) else str(x)


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


PROJECTED = ("leftover", "adaptive_overlap", "ragged")
# What low precision is given of them; it cannot tell one gelu from the other.
LOW = [
    (mutation, "leftover")
    for mutation in (
        drop_one_element_of_each_window,
        leave_the_first_bias_out,
        leave_the_norms_bias_out,
        forget_the_guides_part_of_the_gradient,
    )
]

CHECKS = [
    *(
        ("prompt_guided_project", mutation, case)
        for mutation in (
            drop_one_element_of_each_window,
            leave_one_patch_out_of_the_softmax,
            leave_the_first_bias_out,
            take_the_other_gelu,
            leave_the_norms_bias_out,
            forget_the_guides_part_of_the_gradient,
        )
        for case in PROJECTED
    ),
    *(
        ("weighted_project", mutation, case)
        for mutation in (drop_one_element_of_each_window, leave_the_first_bias_out, take_the_other_gelu)
        for case in PROJECTED
    ),
    *(("weighted_pool3d", drop_one_element_of_each_window, case) for case in POOLED),
    *(("prompt_relevance", leave_one_patch_out_of_the_softmax, case) for case in SCORED),
    *(("prompt_guided_pool3d", drop_one_element_of_each_window, case) for case in POOLED),
    *(("weighted_pool3d", lose_a_tenth_of_the_gradient, case) for case in GUIDED),
    *(("prompt_relevance", lose_a_tenth_of_the_gradient, case) for case in GUIDED),
    *(("prompt_guided_pool3d", leave_one_patch_out_of_the_softmax, case) for case in SCORED),
]


@pytest.mark.parametrize(
    ("op", "mutation", "case", "dtype"),
    [
        (*check, dtype)
        for check in CHECKS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if dtype == torch.float32 or not check[0].endswith("project") or check[1:] in LOW
    ],
    ids=label,
)
def test_cpp_is_rejected(op, mutation, case, dtype, monkeypatch):
    reject(op, mutation, case, dtype, ("cpp", "cpu"), monkeypatch)


# Of the projector one for each op, since Triton's interpreter takes seconds for each.
EVERYWHERE = [c for c in CHECKS if c[2] == "leftover" and not c[0].endswith("project")]
EVERYWHERE += [
    ("prompt_guided_project", forget_the_guides_part_of_the_gradient, "adaptive_overlap"),
    ("weighted_project", drop_one_element_of_each_window, "adaptive_overlap"),
]


@pytest.mark.parametrize(("op", "mutation", "case"), EVERYWHERE, ids=label)
def test_every_backend_is_rejected(op, mutation, case, place, monkeypatch):
    reject(op, mutation, case, torch.float32, place, monkeypatch)


def reject(op, mutation, case, dtype, place, monkeypatch):
    make = make_projector_inputs if op.endswith("project") else make_inputs
    tensors = make(CASES[case], (dtype, dtype, dtype, torch.float32))
    check(op, CASES[case], tensors, place)
    mutation(monkeypatch)
    with pytest.raises(AssertionError, match=f"{op} {place[0]} .*: error .* is not <= "):
        check(op, CASES[case], tensors, place)


def test_every_op_is_mutated():
    assert {check[0] for check in CHECKS} == set(OPS)
