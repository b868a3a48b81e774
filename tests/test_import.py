"""What `import ppllava` brings along, and that the model is in transformers' Auto classes in every order of imports."""

import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

import ppllava
from ppllava import versions

ROOT = Path(__file__).parent.parent
KNOWN = """
import inspect, sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PROCESSOR_MAPPING
import ppllava
config = AutoConfig.for_model("ppllava")
assert type(config) is ppllava.PPLlavaConfig
assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)] is ppllava.PPLlavaForConditionalGeneration
assert PROCESSOR_MAPPING[type(config)] is ppllava.PPLlavaProcessor
from ppllava import auto, btadapter, compat
assert compat.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["ppllava"] == "PPLlavaForConditionalGeneration"
assert not any(isinstance(finder, auto._Waiting) for finder in sys.meta_path)
for module in (sys.modules["transformers"], btadapter):
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
assert inspect.getsource(btadapter)
"""


def run(program, *options):
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_video_needs_neither_torch_nor_transformers():
    run("""
        import sys
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "transformers", "PIL", "huggingface_hub"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        import importlib.util
        heavy = {"torch", "transformers", "matplotlib", "ppllava_kernels"}
        import ppllava
        assert not heavy & {*sys.modules}
        sys.meta_path.insert(0, Absent())
        assert ppllava.video.read_video is __import__("ppllava.video", fromlist=["read_video"]).read_video
        import ppllava.sampling, ppllava.video, ppllava.video_index
        assert not heavy & {*sys.modules}
        assert {*ppllava.__all__, "video"} <= {*dir(ppllava)}
        try:
            ppllava.PPLlavaModel
        except ModuleNotFoundError as error:
            assert error.name == "torch"
        else:
            raise AssertionError
    """)


def test_without_torch_nothing_waits_for_transformers():
    run("""
        import importlib.util, sys
        found = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "torch" else found(name, package)
        before = [*sys.meta_path]
        import ppllava.video
        assert sys.meta_path == before
    """)


def test_in_every_order_registered_once(tmp_path):
    """With a transformers that is empty, and modules of this package that import it or do not."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "inner.py").write_text("import transformers\n")
    (tmp_path / "outer.py").write_text("import ppllava.inner\nfrom ppllava import auto\nassert not auto.done\n")
    (tmp_path / "fails.py").write_text("import transformers\nraise RuntimeError\n")
    (tmp_path / "light.py").write_text("")
    run(f"""
        import contextlib, importlib, sys
        sys.path.insert(0, {str(tmp_path)!r})
        import ppllava
        from ppllava import auto
        ppllava.__path__.append({str(tmp_path)!r})

        def orders(*names):
            "How often it registers, after each of these imports."
            for name in ("transformers", "ppllava.outer", "ppllava.inner", "ppllava.fails", "ppllava.light"):
                sys.modules.pop(name, None)
            sys.meta_path[:] = [x for x in sys.meta_path if not isinstance(x, auto._Waiting)]
            auto.done, counts = [], []
            auto._try_to_register = lambda: auto.done.append(1)
            for name in names:
                with contextlib.suppress(RuntimeError):
                    auto.register_when_imported() if name is None else importlib.import_module(name)
                counts.append(len(auto.done))
            return counts

        assert orders("transformers", None, "ppllava.light") == [0, 1, 1]
        assert orders(None, "ppllava.light", "transformers", "ppllava.light") == [0, 0, 1, 1]
        assert orders(None, "ppllava.inner", "transformers") == [0, 1, 1]
        assert orders(None, "ppllava.outer") == [0, 1]  # once all of it is there
        assert orders(None, "ppllava.fails", "ppllava.light") == [0, 0, 1]
    """)


@pytest.mark.parametrize(
    "first", ["import ppllava", "from ppllava.btadapter import BTAdapterVisionModel"], ids=["package", "submodule"]
)
def test_the_auto_classes_know_the_model(first):
    run(f"{first}\n{KNOWN}", "-W", "error::RuntimeWarning")


def test_a_transformers_that_does_not_work_leaves_the_rest(tmp_path):
    (tmp_path / "transformers.py").write_text("")
    said = run(f"""
        import sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import ppllava
            import transformers
            import ppllava.video
        print(*(warning.message for warning in caught), sep="\\n")
    """)
    assert said.startswith("ppllava could not register its model with transformers (ImportError: cannot import name")
    assert said.count("\n") == 1


def test_names_of_the_package():
    for name in ppllava.__all__:
        assert getattr(ppllava, name) is not None
    assert {*ppllava._HOMES} == {*ppllava.__all__}
    assert {*ppllava.__all__, *ppllava._MODULES} <= {*dir(ppllava)}
    with pytest.raises(AttributeError, match=r"^module 'ppllava' has no attribute 'nothing'$"):
        ppllava.nothing  # noqa: B018


@pytest.fixture
def installed(monkeypatch):
    """installed(requirements, name=version, ...): what the metadata of installed packages say."""

    def install(requirements, **found):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: requirements)

    return install


RANGES = ['transformers<5.25,>=5.19; extra == "model"', 'torchao<0.19,>=0.18; extra == "fp8"', "av>=14", "numpy"]


def test_an_untested_version_is_named_once(installed):
    installed(RANGES, transformers="5.25.0.dev0", torchao="0.20.1+cpu", av="19.0.2")
    with pytest.warns(UserWarning, match="was not tested with") as caught:
        versions.warn_of_untested()
    assert [str(warning.message) for warning in caught] == [
        "ppllava was not tested with transformers 5.25.0.dev0 (transformers<5.25,>=5.19), torchao 0.20.1+cpu "
        "(torchao<0.19,>=0.18); where something fails, install a version in the range"
    ]


@pytest.mark.parametrize(
    ("requirements", "found"),
    [
        (RANGES, {"transformers": "5.24.9", "av": "19.0.2"}),
        (RANGES, {"transformers": "unknown"}),
        (RANGES, {}),
        (None, {"transformers": "99.0"}),
    ],
    ids=["tested", "odd", "absent", "no metadata"],
)
@pytest.mark.filterwarnings("error")
def test_else_nothing_is_said(installed, requirements, found):
    installed(requirements, **found)
    versions.warn_of_untested()


@pytest.mark.filterwarnings("error")
def test_a_checkout_that_is_not_installed(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    versions.warn_of_untested()
