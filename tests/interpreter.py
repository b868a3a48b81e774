"""Triton's interpreter (3.6 to 3.9) without what it computes for nothing, which is most of its time.

It puts its own functions into triton.language for a launch, and does so again at each call of a helper, `tl.sum`
included, where nothing is left to put. And each integer sum is made in int64, too, for a check of debug=True alone.
"""

import dataclasses
import functools
import inspect

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
