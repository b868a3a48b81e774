"""The model in transformers' Auto classes, entered when transformers is imported and not before.

transformers has no entry point for models of other packages, so `import ppllava` has to enter its own. Where
transformers is there, it does so at once. Else a finder at the head of `sys.meta_path` waits for the import of
transformers, in whatever order, and is gone once the model is entered.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .quiet_imports import hushed


def register_when_imported() -> None:
    """Register now where transformers is imported, else as soon as it is. Without torch the model is not there."""
    if importlib.util.find_spec("torch") is None:
        return
    if "transformers" in sys.modules:
        _try_to_register()
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds nothing by itself: it sees when transformers, or a module of this package, has been imported.

    A module of this package may be what imports transformers. It is half there then, and to import the model would fail
    in a circle: so the end of the outermost such module is waited for.
    """

    def __init__(self) -> None:
        self.depth = 0  # modules of this package whose import has begun and not ended

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.startswith(f"{__package__}.")
        if not ours and fullname != "transformers":
            return None
        others = (finder for finder in [*sys.meta_path] if finder is not self and hasattr(finder, "find_spec"))
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Seen(spec.loader, self, int(ours))
        return spec

    def ended(self) -> None:
        """The import of a module that was seen is over."""
        if self.depth == 0 and "transformers" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            _try_to_register()


class _Seen(Loader):
    """Another loader, which the module gets back before it runs."""

    def __init__(self, loader: Loader, waiting: _Waiting, depth: int) -> None:
        self.loader, self.waiting, self.depth = loader, waiting, depth

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.waiting.depth += self.depth
        try:
            with hushed():
                self.loader.exec_module(module)
        finally:
            self.waiting.depth -= self.depth
        self.waiting.ended()


def _try_to_register() -> None:
    """A transformers that does not work must not take down what needs none of it; what does says the same again."""
    try:
        with hushed():
            from . import registration  # noqa: F401
    except Exception as error:
        warnings.warn(
            f"ppllava could not register its model with transformers ({type(error).__name__}: {error}); "
            "import ppllava.modeling_ppllava shows where",
            RuntimeWarning,
            stacklevel=2,
        )


__all__ = ["register_when_imported"]
