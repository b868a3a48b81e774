"""Names that another library does not promise: each is there, and none is used outside of compat.py."""

import ast
import copy
import importlib
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from tiny import fresh, prompt, tiny

from ppllava import compat

PACKAGE = Path(compat.__file__).parent
LIBRARIES = {"transformers", "accelerate", "peft", "ray", "torch", "torchao", "torchcodec", "datasets"}
# Modules of these libraries, besides their top level, that their documentation describes.
DOCUMENTED = {
    "accelerate.hooks",
    "ray.data",
    "torch.nn",
    "torch.nn.functional",
    "torch.utils.checkpoint",
    "torchao.quantization",
    "transformers.modeling_outputs",
}
# Names with an underscore of Python itself.
PYTHON = {"_asdict", "_replace", "_exit"}


def find(name):
    """The object that a dotted name means; the longest module in it first."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("versions", compat.SEEN)
def test_every_name_is_there(versions):
    library = versions.split()[0]
    if library in ("ray", "accelerate"):
        pytest.importorskip(library, reason=f"needs {library}; make test installs it")
    if library == "ray":  # an attribute that only a dataset has
        assert compat.EXECUTOR in Path(find("ray.data.dataset").__file__).read_text()
        return
    for name in compat.SEEN[versions]:
        assert name.startswith(f"{library}.")
        find(name)


def test_attributes_of_modules_are_there():
    module = torch.nn.Linear(2, 2)
    assert all(isinstance(module.__dict__[name], dict) for name in compat.WEIGHTS)
    torch.compile(torch.nn.Linear(2, 2), backend="eager")
    assert hasattr(module, compat.COMPILED[0])
    hooks = find("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert {compat.HOOK, compat.HOOKED_FORWARD} <= module.__dict__.keys()


@cache
def trees():
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def own_names():
    """What the package itself defines: functions, classes, variables and attributes of self."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree)]
    names = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def foreign(tree, own):
    """(line, name) of what a file takes from other libraries that they do not promise."""
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
            if node.module.partition(".")[0] in LIBRARIES:
                yield from ((node.lineno, alias.name) for alias in node.names if alias.name in UNDOCUMENTED)
                yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("_"))
        for name in modules:
            if name.partition(".")[0] in LIBRARIES and "." in name and name not in DOCUMENTED:
                yield node.lineno, name
        used = None
        if isinstance(node, ast.Attribute):
            used = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            used = node.value if node.value in STRINGS else None
        if used and used.startswith("_") and not used.endswith("__") and used not in own | PYTHON:
            yield node.lineno, used


UNDOCUMENTED = {"initialization", "conversion_mapping", "core_model_loading", "image_utils", "video_utils"}
STRINGS = {
    *compat.WEIGHTS,
    *compat.COMPILED,
    compat.HOOK,
    compat.HOOKED_FORWARD,
    compat.PREVIOUS_CACHE,
    compat.EXECUTOR,
}


def test_no_other_file_uses_one():
    own = own_names()
    found = {
        f"{path.relative_to(PACKAGE)}:{line}: {name}"
        for path, tree in trees().items()
        if path.name != "compat.py"
        for line, name in foreign(tree, own)
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "from transformers.utils.generic import can_return_tuple",
        "import transformers.video_utils",
        "from transformers import initialization",
        "model._from_config(config)",
        "getattr(module, '_hf_hook')",
    ],
)
def test_the_search_finds(line):
    assert list(foreign(ast.parse(line), set()))


def test_overridden_names_are_among_them():
    """A hook of another name would never be called."""
    seen = {name.rpartition(".")[2] for names in compat.SEEN.values() for name in names}
    theirs = (transformers.PreTrainedModel, transformers.ProcessorMixin, transformers.PreTrainedConfig)
    found = set()
    for tree in trees().values():
        for cls in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
            names = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
            names |= {name.id for node in cls.body for name in getattr(node, "targets", ()) if hasattr(name, "id")}
            found |= {x for x in names if re.match("_[a-z]", x) and any(hasattr(base, x) for base in theirs)}
    assert found
    assert found <= seen


@torch.no_grad()
@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_has_one_name():
    """No FutureWarning of transformers 5.24, and a cache is used by either name."""
    model, processor = tiny()
    inputs = processor(text=prompt("Why?", ""))
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    cached = transformers.DynamicCache(config=model.config.get_text_config())
    model(input_ids=ids[:, :-1], **{compat.cache_name(model.model.language_model.forward): cached})
    assert cached.get_seq_length() == ids.shape[1] - 1
    expected = model(input_ids=ids).logits[:, -1]
    mask = torch.ones_like(ids)
    for name in ("past_key_values", "cache"):
        one = copy_of(cached)
        actual = model(input_ids=ids[:, -1:], attention_mask=mask, **{name: one}).logits[:, -1]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        hidden = model.model(input_ids=ids[:, -1:], attention_mask=mask, **{name: copy_of(cached)}).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden[:, -1]), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"^past_key_values and cache must be one cache, got two; pass it as cache"):
        model(input_ids=ids[:, -1:], past_key_values=copy_of(cached), cache=cached)


def copy_of(cache):
    return copy.deepcopy(cache)


def test_a_model_knows_what_its_language_model_calls_the_cache():
    model = fresh().model
    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert model._cache_name == model._base_cache_name == ("cache" if version >= (5, 24) else "past_key_values")
