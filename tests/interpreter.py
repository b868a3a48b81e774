"""Triton's interpreter (3.6 to 3.9) that rounds as compiled code does, without what it computes for nothing.

It cuts float32 off where it makes bfloat16 of it, while compiled kernels round to nearest, ties to even (`cvt.rn`,
which test_triton_compile.py looks for). So tests in bfloat16 would see results here that no GPU gives, and could not
tell a kernel that cuts off itself. `round_to_nearest` gives the interpreter the rounding of compiled code;
test_interpreter.py compares it bit for bit, and test_rounding.py holds every backend to it.

Most of its time is for nothing: it puts its own functions into triton.language for a launch, and does so again at each
call of a helper, `tl.sum` included, where nothing is left to put. Each integer sum is made in int64, too, for a check
of debug=True alone. And types and shapes, of which there are few, are made anew for every result.
"""

import dataclasses
import functools
import inspect

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_fast() -> None:
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # tl and tl.core, as far as this launch has met them

    @functools.cache
    def modules_of(fn):
        return {id(tl), id(tl.core)} & {id(x) for x in fn.__globals__.values() if inspect.ismodule(x)}

    def patch_what_is_new(fn):
        modules = modules_of(fn)
        if modules and modules <= patched:
            return None  # of a helper, for a launch comes first; nobody asks for it
        patched.update(modules)
        return patch(fn)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_what_is_new
    interpreter.GridExecutor.__call__ = launch_anew
    know_types()


def know_types() -> None:
    """By name, which says all of a type."""
    np_dtype, unwrap = interpreter._get_np_dtype, tl.core._unwrap_if_constexpr
    tensor, block, equal = tl.tensor.__init__, tl.block_type.__init__, tl.dtype.__eq__
    dtypes, shapes, blocks = {}, {}, {}

    def known_np_dtype(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = np_dtype(dtype)
        return dtypes[dtype.name]

    def tensor_of_known_shape(self, handle, dtype):
        if dtype.name not in shapes:
            tensor(self, handle, dtype)
            shapes[dtype.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
        self.shape, self.numel = shapes[dtype.name]

    def known_block(self, element_ty, shape):
        key = (element_ty.name, *(getattr(n, "value", n) for n in shape))
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    def unwrap_at_once(x):
        kind = type(x)
        return x.value if kind is tl.constexpr else x if kind in plain else unwrap(x)

    plain = {tl.tensor, tl.dtype, tl.block_type, int, bool, float, str, type(None)}
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    interpreter._get_np_dtype = known_np_dtype
    tl.tensor.__init__ = tensor_of_known_shape
    tl.block_type.__init__ = known_block
    tl.core._unwrap_if_constexpr = unwrap_at_once


def round_to_nearest() -> None:
    convert, toward_zero = interpreter._convert_float, interpreter._ir.ROUNDING_MODE.RTZ

    def convert_as_compiled(x, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return x.view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16) or rounding == toward_zero:
            return convert(x, source, target, rounding)
        bits = x.view(np.uint32)
        # Half of the last bit that is kept, and less where that bit is 0: a tie goes to even.
        nearest = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(x), 0x7FFF, nearest).astype(np.uint16)

    interpreter._convert_float = convert_as_compiled
