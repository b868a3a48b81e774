"""Every torch.library line: schemas, implementations, fakes and gradients of the registered ops.

The kernels of a backend appear here as ops that take the backend's name, the backward ones too, so that torch.compile
and torch.export see one opaque node in each direction. The reference is plain PyTorch and needs no registration.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import compat
from .backends import BACKENDS, empty
from .shapes import Window, output_shape

# The package's own name: another copy of it, loaded under another name, registers beside this one.
NAMESPACE = __package__.replace(".", "_")
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
ops = getattr(torch.ops, NAMESPACE)

_KERNELS = {name: backend for name, backend in BACKENDS.items() if name != "reference"}

_EMBEDS = "Tensor image_embeds, Tensor text_embeds, Tensor? scale_tensor, float scale"
_WINDOW = "SymInt[] kernel_size, SymInt[] stride, SymInt[] output_size, float temperature"
_WHERE = "Tensor? cu_frames, str backend"


def _register(schema: str):
    """Define the op of `schema`, implemented by the decorated function on every device that its backends know."""

    def decorator(function):
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        compat.hide_from_dynamo(function)
        _library.impl(function.__name__, function, "CompositeExplicitAutograd")
        return function

    return decorator


def _fake(function):
    """Register the decorated function as the fake of the op that it is named after."""
    name = function.__name__.removesuffix("_fake")

    def run(*arguments):
        # cu_frames, which stands before the backend, may stay on the CPU. Where one tensor of several is on meta,
        # PyTorch asks for the fake, too.
        cu_frames = next(n for n, x in enumerate(arguments) if isinstance(x, str)) - 1
        devices = {x.device for n, x in enumerate(arguments) if isinstance(x, Tensor) and n != cu_frames}
        if len(devices) > 1:
            raise ValueError(
                f"the tensors of a call must be on one device, got {' and '.join(sorted(map(str, devices)))}; move them"
            )
        return function(*arguments)

    return torch.library.register_fake(f"{NAMESPACE}::{name}", run, lib=_library)


def _register_autograd(function, save, backward):
    """Register the gradient of the op that `function` implements.

    As torch.library.register_autograd, whose kernel dispatches each call a second time, below autograd. Where that
    could only find `function`, it is called at once: 7 us less of 13 for a call of a kernel that does nothing.
    """
    name = function.__name__
    op = getattr(ops, name).default

    def run(keys, arguments):
        if compat.is_plain(keys):
            return function(*arguments)
        with compat.below_autograd():
            return op.redispatch(compat.keys_below_autograd(keys), *arguments)

    def run_and_save(ctx, *arguments):
        *arguments, keys = arguments
        if compat.in_transform():  # `apply` switched gradients off, which outer levels of torch.func still want
            with torch.enable_grad():
                output = run(keys, arguments)
        else:
            output = run(keys, arguments)
        save(ctx, arguments, output)
        return output

    @compat.hide_from_dynamo
    def run_backward(ctx, *grads):
        return *backward(ctx, *grads), None  # for the keys

    methods = dict(forward=staticmethod(run_and_save), backward=staticmethod(run_backward))
    gradient = type(name, (torch.autograd.Function,), methods)

    @compat.hide_from_dynamo
    def autograd(keys, *arguments):
        if compat.in_forward_mode():
            _check_no_tangents(arguments)
        if torch.is_grad_enabled() and compat.any_requires_grad(*arguments):
            if compat.in_transform():
                return compat.apply_in_transform(gradient, *arguments, keys)
            return gradient.apply(*arguments, keys)
        return run(keys, arguments)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def _check_no_tangents(arguments) -> None:
    """A registered op would lose them without a word."""
    tensors = (x for x in arguments if isinstance(x, Tensor))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        backend = next(x for x in arguments if isinstance(x, str))
        raise RuntimeError(
            f"backend={backend!r} has no forward-mode derivative; use backend='reference', which is plain PyTorch, "
            "for it"
        )


def _kernels(backend: str, clips: Tensor):
    """The module that computes a call for these clips."""
    if backend not in _KERNELS:
        raise ValueError(
            f"backend of a registered op must be one of {', '.join(_KERNELS)}, got {backend!r}; the reference is plain "
            "PyTorch, which the functions of the package call"
        )
    return _KERNELS[backend] if clips.numel() else empty


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_register(f"prompt_relevance({_EMBEDS}, {_WHERE}) -> Tensor")
def prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend):
    return _kernels(backend, image_embeds).prompt_relevance(image_embeds, text_embeds, scale_tensor, scale, cu_frames)


@_fake
def prompt_relevance_fake(image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend):
    return image_embeds.new_empty(image_embeds.shape[:-1], dtype=_accumulator(image_embeds))


@_register(f"prompt_relevance_backward(Tensor grad, Tensor relevance, {_EMBEDS}, {_WHERE}) -> (Tensor, Tensor, Tensor)")
def prompt_relevance_backward(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend):
    return _kernels(backend, image_embeds).prompt_relevance_backward(
        grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames
    )


@_fake
def prompt_relevance_backward_fake(grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend):
    grad_scale = grad.new_empty((), dtype=_accumulator(image_embeds))
    return image_embeds.new_empty(image_embeds.shape), text_embeds.new_empty(text_embeds.shape), grad_scale


@_register(f"weighted_pool3d(Tensor values, Tensor? weights, {_WINDOW}, {_WHERE}) -> Tensor")
def weighted_pool3d(values, weights, kernel_size, stride, output_size, temperature, cu_frames, backend):
    window = Window(tuple(kernel_size), tuple(stride), tuple(output_size))
    return _kernels(backend, values).weighted_pool3d(values, weights, window, temperature, cu_frames)


@_fake
def weighted_pool3d_fake(values, weights, kernel_size, stride, output_size, temperature, cu_frames, backend):
    return _fake_pooled(values, kernel_size, stride, output_size, cu_frames)


def _fake_pooled(values, kernel_size, stride, output_size, cu_frames):
    *lead, height, width, channels = values.shape  # lead: [B, T] or [F]
    frames, rows, columns = output_shape((lead[-1], height, width), kernel_size, stride, output_size)
    if cu_frames is None:
        lead = [lead[0], frames]
    elif output_size:
        lead = [cu_frames.shape[0] - 1, frames]
    else:  # each video drops its own leftover frames, so that the total depends on the values of cu_frames
        single = kernel_size[0] == 1 and stride[0] == 1
        lead = [values.shape[0] if single else torch.library.get_ctx().new_dynamic_size()]
    return values.new_empty([*lead, rows, columns, channels])


@_register(
    f"weighted_pool3d_backward(Tensor grad, Tensor values, Tensor? weights, {_WINDOW}, {_WHERE}, bool need_values, "
    "bool need_weights) -> (Tensor, Tensor)"
)
def weighted_pool3d_backward(
    grad, values, weights, kernel_size, stride, output_size, temperature, cu_frames, backend, need_values, need_weights
):
    window = Window(tuple(kernel_size), tuple(stride), tuple(output_size))
    return _kernels(backend, values).weighted_pool3d_backward(
        grad, values, weights, window, temperature, cu_frames, need_values, need_weights
    )


@_fake
def weighted_pool3d_backward_fake(
    grad, values, weights, kernel_size, stride, output_size, temperature, cu_frames, backend, need_values, need_weights
):
    grad_values = values.new_empty(values.shape if need_values else 0)
    grad_weights = weights.new_empty(weights.shape) if need_weights else values.new_empty(0)
    return grad_values, grad_weights


@_register(f"prompt_guided_pool3d(Tensor values, {_EMBEDS}, {_WINDOW}, {_WHERE}) -> (Tensor, Tensor)")
def prompt_guided_pool3d(
    values, image_embeds, text_embeds, scale_tensor, scale, kernel_size, stride, output_size, temperature, cu_frames,
    backend,
):  # fmt: skip
    window = Window(tuple(kernel_size), tuple(stride), tuple(output_size))
    return _kernels(backend, values).prompt_guided_pool3d(
        values, image_embeds, text_embeds, scale_tensor, scale, window, temperature, cu_frames
    )


@_fake
def prompt_guided_pool3d_fake(
    values, image_embeds, text_embeds, scale_tensor, scale, kernel_size, stride, output_size, temperature, cu_frames,
    backend,
):  # fmt: skip
    pooled = _fake_pooled(values, kernel_size, stride, output_size, cu_frames)
    return pooled, image_embeds.new_empty(image_embeds.shape[:-1], dtype=_accumulator(image_embeds))


_GUIDE = "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor guide_weight"
_LINEAR = "Tensor linear_1_weight, Tensor? linear_1_bias"
_PROJECTED = f"Tensor features, Tensor text_embeds, Tensor? scale_tensor, float scale, {_GUIDE}, {_WHERE}"


@_register(f"guide_relevance({_PROJECTED}) -> (Tensor, Tensor)")
def guide_relevance(features, *arguments):
    """(relevance, cosines), the second for the backward."""
    return _kernels(arguments[-1], features).guide_relevance(features, *arguments[:-1])


@_fake
def guide_relevance_fake(features, *arguments):
    return tuple(features.new_empty(features.shape[:-1], dtype=_accumulator(features)) for _ in range(2))


@_register(
    f"guide_relevance_backward(Tensor grad, Tensor relevance, Tensor cosines, {_PROJECTED}, bool need_features, "
    "bool need_text, bool need_norm, bool need_guide) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def guide_relevance_backward(grad, relevance, cosines, features, *arguments):
    *arguments, backend, need_features, need_text, need_norm, need_guide = arguments
    return _kernels(backend, features).guide_relevance_backward(
        features, grad, relevance, cosines, *arguments, need_features, need_text, need_norm, need_guide
    )


@_fake
def guide_relevance_backward_fake(
    grad, relevance, cosines, features, text_embeds, scale_tensor, scale, norm_weight, norm_bias, norm_eps,
    guide_weight, cu_frames, backend, need_features, need_text, need_norm, need_guide,
):  # fmt: skip
    return (
        features.new_empty(features.shape if need_features else 0),
        text_embeds.new_empty(text_embeds.shape if need_text else 0),
        grad.new_empty((), dtype=_accumulator(features)),
        *(
            features.new_empty(0) if x is None or not need_norm else x.new_empty(x.shape)
            for x in (norm_weight, norm_bias)
        ),
        guide_weight.new_empty(guide_weight.shape if need_guide else 0),
    )


@_register(f"hidden_pool3d(Tensor features, Tensor? weights, {_LINEAR}, {_WINDOW}, {_WHERE}) -> Tensor")
def hidden_pool3d(
    features, weights, linear_1_weight, linear_1_bias, kernel_size, stride, output_size, temperature, cu_frames, backend
):
    window = Window(tuple(kernel_size), tuple(stride), tuple(output_size))
    return _kernels(backend, features).hidden_pool3d(
        features, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames
    )


@_fake
def hidden_pool3d_fake(
    features, weights, linear_1_weight, linear_1_bias, kernel_size, stride, output_size, temperature, cu_frames, backend
):
    pooled = _fake_pooled(features, kernel_size, stride, output_size, cu_frames)
    return pooled.new_empty([*pooled.shape[:-1], linear_1_weight.shape[0]])


@_register(
    f"hidden_pool3d_backward(Tensor grad, Tensor features, Tensor? weights, {_LINEAR}, {_WINDOW}, {_WHERE}, "
    "bool need_features, bool need_weights, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)"
)
def hidden_pool3d_backward(
    grad, features, weights, linear_1_weight, linear_1_bias, kernel_size, stride, output_size, temperature, cu_frames,
    backend, need_features, need_weights, need_weight, need_bias,
):  # fmt: skip
    window = Window(tuple(kernel_size), tuple(stride), tuple(output_size))
    return _kernels(backend, features).hidden_pool3d_backward(
        features, grad, weights, linear_1_weight, linear_1_bias, window, temperature, cu_frames, need_features,
        need_weights, need_weight, need_bias,
    )  # fmt: skip


@_fake
def hidden_pool3d_backward_fake(
    grad, features, weights, linear_1_weight, linear_1_bias, kernel_size, stride, output_size, temperature, cu_frames,
    backend, need_features, need_weights, need_weight, need_bias,
):  # fmt: skip
    return (
        features.new_empty(features.shape if need_features else 0),
        weights.new_empty(weights.shape) if need_weights else features.new_empty(0),
        linear_1_weight.new_empty(linear_1_weight.shape if need_weight else 0),
        linear_1_bias.new_empty(linear_1_bias.shape) if need_bias else features.new_empty(0),
    )


def _save_relevance(ctx, inputs, output):
    image_embeds, text_embeds, scale_tensor, *ctx.arguments = inputs
    scale, cu_frames, backend = ctx.arguments
    ctx.arguments = (scale, backend)
    ctx.save_for_backward(output, image_embeds, text_embeds, scale_tensor, cu_frames)


def _relevance_backward(ctx, grad):
    relevance, image_embeds, text_embeds, scale_tensor, cu_frames = ctx.saved_tensors
    scale, backend = ctx.arguments
    grads = ops.prompt_relevance_backward(
        grad, relevance, image_embeds, text_embeds, scale_tensor, scale, cu_frames, backend
    )
    return *_where_needed(ctx.needs_input_grad, grads), None, None, None


def _save_pool(ctx, inputs, output):
    values, weights, *ctx.window, cu_frames, ctx.backend = inputs
    ctx.save_for_backward(values, weights, cu_frames)


def _pool_backward(ctx, grad):
    values, weights, cu_frames = ctx.saved_tensors
    need = ctx.needs_input_grad[:2]
    grads = ops.weighted_pool3d_backward(grad, values, weights, *ctx.window, cu_frames, ctx.backend, *need)
    return *_where_needed(need, grads), None, None, None, None, None, None


def _save_guided(ctx, inputs, output):
    values, image_embeds, text_embeds, scale_tensor, ctx.scale, *ctx.window, cu_frames, ctx.backend = inputs
    ctx.save_for_backward(values, output[1], image_embeds, text_embeds, scale_tensor, cu_frames)


def _guided_backward(ctx, grad_pooled, grad_relevance):
    values, relevance, *embeds, cu_frames = ctx.saved_tensors
    need_values, *need_embeds = ctx.needs_input_grad[:4]
    # A relevance that needs no gradient saves the whole second half.
    grad_values, grad = ops.weighted_pool3d_backward(
        grad_pooled, values, relevance, *ctx.window, cu_frames, ctx.backend, need_values, any(need_embeds)
    )
    grads = (None, None, None)
    if any(need_embeds):
        grads = ops.prompt_relevance_backward(
            grad + grad_relevance, relevance, *embeds, ctx.scale, cu_frames, ctx.backend
        )
    return *_where_needed((need_values, *need_embeds), (grad_values, *grads)), *(None,) * 7


def _save_guide(ctx, inputs, output):
    features, text_embeds, scale_tensor, ctx.scale, norm_weight, norm_bias, ctx.norm_eps, *rest = inputs
    guide_weight, cu_frames, ctx.backend = rest
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, features, text_embeds, scale_tensor, norm_weight, norm_bias, guide_weight, cu_frames)


def _guide_backward(ctx, grad, _):
    relevance, cosines, features, text_embeds, scale_tensor, *weights, cu_frames = ctx.saved_tensors
    norm_weight, norm_bias, guide_weight = weights
    need = ctx.needs_input_grad
    need_norm = need[4] or need[5]
    features, text, scale, weight, bias, guide = ops.guide_relevance_backward(
        grad, relevance, cosines, features, text_embeds, scale_tensor, ctx.scale, norm_weight, norm_bias,
        ctx.norm_eps, guide_weight, cu_frames, ctx.backend, *need[:2], need_norm, need[7],
    )  # fmt: skip
    grads = (features, text, scale, None, weight, bias, None, guide)
    return *_where_needed(need[:8], grads), None, None


def _save_hidden(ctx, inputs, output):
    features, weights, linear_1_weight, linear_1_bias, *ctx.window, cu_frames, ctx.backend = inputs
    ctx.save_for_backward(features, weights, linear_1_weight, linear_1_bias, cu_frames)


def _hidden_backward(ctx, grad):
    features, weights, linear_1_weight, linear_1_bias, cu_frames = ctx.saved_tensors
    need = ctx.needs_input_grad[:4]
    grads = ops.hidden_pool3d_backward(
        grad, features, weights, linear_1_weight, linear_1_bias, *ctx.window, cu_frames, ctx.backend, *need
    )
    return *_where_needed(need, grads), None, None, None, None, None, None


def _where_needed(need, grads):
    return tuple(grad if needed else None for needed, grad in zip(need, grads))


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        f"backend={ctx.backend!r} has no double backward; use backend='reference', which is plain PyTorch, for it"
    )


def _save_backend(ctx, inputs, output):
    ctx.backend = next(x for x in inputs if isinstance(x, str))


_register_autograd(prompt_relevance, _save_relevance, _relevance_backward)
_register_autograd(weighted_pool3d, _save_pool, _pool_backward)
_register_autograd(prompt_guided_pool3d, _save_guided, _guided_backward)
_register_autograd(guide_relevance, _save_guide, _guide_backward)
_register_autograd(hidden_pool3d, _save_hidden, _hidden_backward)
_register_autograd(prompt_relevance_backward, _save_backend, _no_double_backward)
_register_autograd(weighted_pool3d_backward, _save_backend, _no_double_backward)
_register_autograd(guide_relevance_backward, _save_backend, _no_double_backward)
_register_autograd(hidden_pool3d_backward, _save_backend, _no_double_backward)
