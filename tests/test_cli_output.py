"""`ppllava` where its answer, its drawings or its own modules meet a full disk, a closed pipe, another encoding."""

import errno
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from cli_fixtures import QUESTION, QUICK, RANDOM, call, files, speak
from PIL import Image

import ppllava_command
from ppllava import PPLlavaForConditionalGeneration, asking, cli

ROOT = Path(__file__).parent.parent
ASK = ("ask", "a.mp4", QUESTION, *QUICK)


@pytest.fixture
def program(files, monkeypatch, capsys):
    """(exit code, stderr) of `ppllava` with another stdout."""
    monkeypatch.chdir(files)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(stdout, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "argv", ["ppllava", *arguments])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


# stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full; run on Linux")
@pytest.mark.parametrize("arguments", [ASK, (*ASK, "--json"), (*ASK, "--each"), ("--help",), ("ask", "--help")])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk(program, arguments, buffered):
    raw = open("/dev/full", "wb", buffering=-1 if buffered else 0)  # noqa: SIM115
    with io.TextIOWrapper(raw, encoding="utf-8", write_through=not buffered) as stdout:
        text = "ppllava: stdout cannot be written (No space left on device); free some space, or write elsewhere\n"
        assert program(stdout, *arguments) == (7, f"{'' if '--help' in arguments else RANDOM}{text}")


@pytest.mark.parametrize("arguments", [ASK, ("--help",), ("ask", "--help"), ("presets",)])
def test_nobody_reads(program, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        assert program(stdout, *arguments) == (141, RANDOM if arguments is ASK else "")


def test_a_closed_stdout(program, monkeypatch):
    monkeypatch.setattr(asking, "load_processor", None)  # not reached
    text = "ppllava: stdout must be open for the answer, got a closed one; leave out >&-\n"
    for arguments in (ASK, ("--help",)):
        assert program(None, *arguments) == (7, text)


def test_a_closed_stderr(program, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", None)
    assert program(stdout, "ask", "none.mp4", QUESTION, *QUICK)[0] == 3
    assert stdout.buffer.getvalue() == b""


def test_an_encoding_with_few_characters(program, files):
    name = "b\udcff\u65e5.mp4"  # a byte that is no UTF-8
    shutil.copy(files / "b.mp4", files / name)
    for encoding in ("ascii", "utf-8"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert program(stdout, "ask", name, "W\u00e4s?", *QUICK, "--json") == (0, RANDOM)
        assert json.loads(stdout.buffer.getvalue())["media"][0]["path"] == name
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        assert program(stdout, "ask", name, "a.mp4", QUESTION, *QUICK, "--each") == (0, RANDOM)
        shown = b"b\\udcff\\u65e5.mp4: " if encoding == "ascii" else "b\\udcff\u65e5.mp4: ".encode()
        assert stdout.buffer.getvalue().startswith(shown)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert program(stdout, "ask", "--help") == (0, "")
    assert b"Exit codes: 0 ok" in stdout.buffer.getvalue()


def test_python_warnings_about_files_stay_inside(program, monkeypatch):
    def warn(path):
        warnings.warn("Corrupt EXIF data", stacklevel=2)
        return Image.open(path)

    monkeypatch.setattr("ppllava.asking.open_image", warn)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    assert program(stdout, "ask", "i.png", QUESTION, "--preset", "tiny", "--max-new-tokens", "1") == (0, RANDOM)


# Terminals


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


WILD = "a\x00\x1b[31mb\x7f\x9b2J\x0e\tc\r\nd"
TAME = "a\\x00\\x1b[31mb\\x7f\\x9b2J\\x0e\tc\\x0d\nd"


@pytest.mark.parametrize("kind", [Terminal, io.TextIOWrapper])
@pytest.mark.parametrize("option", [(), ("--each",), ("--json",)])
def test_control_characters_never_reach_a_terminal(program, monkeypatch, kind, option):
    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", speak(WILD))
    stdout = kind(io.BytesIO(), encoding="utf-8", newline="")
    assert program(stdout, *ASK, *option) == (0, RANDOM)
    text = stdout.buffer.getvalue().decode()
    if option == ("--json",):
        assert json.loads(text)["answer"] == WILD
        assert text.isprintable() or text.removesuffix("\n").isprintable()
    else:
        assert text == (TAME if kind is Terminal else WILD) + "\n"


def test_control_characters_of_several_answers(program, monkeypatch):
    monkeypatch.setattr(PPLlavaForConditionalGeneration, "generate", speak("a\x1bb", "c\x07d"))
    for kind, text in (
        (Terminal, "a.mp4: a\\x1bb\nb.mp4: c\\x07d\n"),
        (io.TextIOWrapper, "a.mp4: a\x1bb\nb.mp4: c\x07d\n"),
    ):
        stdout = kind(io.BytesIO(), encoding="utf-8")
        assert program(stdout, "ask", "a.mp4", "b.mp4", QUESTION, *QUICK, "--each") == (0, RANDOM)
        assert stdout.buffer.getvalue().decode() == text


def test_control_characters_in_the_name_of_a_file(program):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    code, said = program(stdout, "ask", "\x1b]0;title\x07\x9b.mp4", QUESTION, *QUICK)
    assert code == 3
    assert said.startswith("ppllava: \\x1b]0;title\\x07\\x9b.mp4: there is no such file; ")
    assert said.removesuffix("\n").isprintable()


# Drawings


@pytest.mark.parametrize("ending", ["png", "mp4"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), ValueError("a reason")])
def test_the_answer_survives_its_drawing(call, monkeypatch, tmp_path, ending, error):
    def fail(path, *_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(f"ppllava.relevance.save_{ending}", fail)
    path = tmp_path / f"out.{ending}"
    plain = call(*ASK).stdout
    result = call(*ASK, "--relevance", path)
    reason = getattr(error, "strerror", None) or str(error)
    text = f"the answer is complete, but '{path}' cannot be drawn ({reason}); choose another place for --relevance"
    assert (result.exit_code, result.stdout, result.stderr) == (3, plain, f"{RANDOM}ppllava: {text}\n")
    assert not path.exists()
    result = call(*ASK, "--relevance", path, "--json")
    assert (result.exit_code, json.loads(result.stdout)["relevance"]) == (3, [str(path)])


def test_drawings_with_too_little_memory(call, monkeypatch, tmp_path):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("ppllava.relevance.draw", fail)
    assert call(*ASK, "--relevance", tmp_path / "out.png").exit_code == 6


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1)])
def test_lines_of_pixels(call, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "line.png")
    options = ("--preset", "tiny", "--max-new-tokens", 1, "--relevance", tmp_path / "out.png")
    result = call("ask", tmp_path / "line.png", QUESTION, *options)
    assert (result.exit_code, result.stderr) == (0, f"{RANDOM}ppllava: wrote {tmp_path / 'out.png'}\n")


# The first seconds

# Runs the command line on each of the lines of its input; what it says, and what it imports.
LIGHT = """
import json, sys, time

import ppllava_command

for line in sys.stdin:
    sys.argv[1:] = json.loads(line)
    try:
        ppllava_command.main()
    except SystemExit as ended:
        print("code", ended.code, flush=True)
print("imported", sorted({"torch", "numpy", "transformers", "av", "PIL"} & {*sys.modules}))
print("seconds", time.process_time())
"""


def test_help_and_wrong_options_import_nothing_heavy(tmp_path):
    wrong = [["ask", "a.mp4"], ["ask", "a.mp4", QUESTION, "--preset", "huge"], ["nonsense"], ["ask", "--fps", "x"], []]
    wrong.append(["run", "r.jsonl", "-o", "a.jsonl", "--preset", "tiny", "--memory", "0"])
    right = [["--version"], ["--help"], *([name, "--help"] for name in ("ask", "run", "convert", "presets"))]
    command = [sys.executable, "-c", LIGHT]
    lines = "\n".join(map(json.dumps, [*right, *wrong]))
    result = subprocess.run(command, input=lines, cwd=ROOT, capture_output=True, text=True, timeout=240)
    said = result.stdout.splitlines()
    assert [line for line in said if line.startswith("code")] == ["code 0"] * len(right) + ["code 2"] * len(wrong)
    assert result.stderr.count("ppllava: ") == len(result.stderr.splitlines()) == len(wrong)
    assert said[-2] == "imported []"
    assert float(said[-1].split()[1]) < 1.5  # for all of them; half a second for one is the aim


def test_version(call):
    result = call("--version")
    names = ("ppllava-kernels", "torch", "transformers", "av")
    own, *others = (ppllava_command.version(name) for name in names)
    packages = ", ".join(f"{name} {version}" for name, version in zip(names[1:], others))
    assert result.stdout == f"ppllava-kernels {own} ({packages}, Python {platform.python_version()})\n"
    assert (result.exit_code, result.stderr) == (0, "")
    assert others[0] == torch.__version__


def test_b10_a_torchvision_that_does_not_fit(call, monkeypatch):
    """As transformers raises it: an error of its own without a name, whose cause is that of torchvision."""

    def fail():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            text = "Could not import module 'AutoProcessor'. Are this object's requirements defined correctly?"
            raise ModuleNotFoundError(text) from error

    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}
    monkeypatch.setattr(ppllava_command.metadata, "version", versions.__getitem__)
    with pytest.raises(ppllava_command.ImportFailure) as raised, ppllava_command.importing():
        fail()
    text = (
        "torchvision 0.28.0 does not fit torch 2.13.0+cpu (operator torchvision::nms does not exist); install the "
        "torchvision that was built for this torch, or uninstall it, as ppllava needs none"
    )
    assert str(raised.value) == text
    monkeypatch.setitem(sys.modules, "ppllava.convert", Broken("ppllava.convert", fail))
    result = call("convert", "source", "target")
    assert (result.exit_code, result.stderr) == (2, f"ppllava: {text}\n")


class Broken(types.ModuleType):
    """A module of which nothing can be had."""

    def __init__(self, name, fail):
        super().__init__(name)
        self.fail = fail

    def __getattr__(self, name):
        self.fail()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ModuleNotFoundError("No module named 'av'", name="av"),
            "the command line needs av, which is missing; run pip",
        ),
        (
            ModuleNotFoundError("No module named 'torchvision'", name="torchvision"),
            "the command line needs torchvision, which is missing; run pip",
        ),
        (
            OSError("libtorch_cuda.so: cannot open shared object file"),
            "the command line cannot be imported (OSError: libtorch_cuda.so: cannot open shared object file); run pip",
        ),
        (ImportError(), "the command line cannot be imported (ImportError: ); run pip"),
    ],
)
def test_what_cannot_be_imported(error, text):
    with pytest.raises(ppllava_command.ImportFailure) as raised, ppllava_command.importing():
        raise error
    assert str(raised.value).startswith(text)


@pytest.mark.parametrize(
    ("imported", "code", "text"),
    [
        (
            "try: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException: pass",
            130,
            "ppllava: interrupted\n",
        ),
        (
            "import no_such_module",
            2,
            "ppllava: the command line needs no_such_module, which is missing; run pip install --no-build-isolation "
            '".[cli]" in the folder of the sources\n',
        ),
    ],
    ids=["interrupt", "missing"],
)
def test_while_importing(tmp_path, imported, code, text):
    package = tmp_path / "ppllava"
    package.mkdir()
    (package / "__init__.py").write_text(f"import os, signal\n{imported}\n")
    (package / "cli.py").write_text("main = print\n")
    shutil.copy(ROOT / "ppllava_command.py", tmp_path)
    result = subprocess.run([sys.executable, "ppllava_command.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (code, "", text)
