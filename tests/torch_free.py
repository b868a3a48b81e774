"""`make test-video`: the tests of reading video, in environments that have neither torch nor transformers.

Python 3.12 and newer get another PyAV than 3.11 does, and no torch is installed for them here. Each environment lies in
the folder given, and is made again when what belongs into it changes. A Python that is not on this machine is named,
and left out; it is an error if none is.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

PYAV = {"3.11": "av>=18.1,<19", "3.12": "av>=19,<20", "3.13": "av>=19,<20"}
OTHERS = ("numpy", "decord; platform_machine == 'x86_64'", "pytest", "pytest-timeout")
ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
TESTS = ("test_sampling.py", "test_video.py", "test_video_damage.py", "test_video_errors.py")
CHECK = (
    "import sys, ppllava.sampling, ppllava.video, ppllava.video_index, av;"
    "found = {'torch', 'transformers'} & {*sys.modules};"
    "sys.exit(f'importing ppllava.video imported {found}' if found else None)"
)


def find(version: str) -> str | None:
    """An interpreter of this version: by its name, or as pyenv or uv know it."""
    name = f"python{version}"
    found = [shutil.which(name)]
    for command in (["pyenv", "whence", "--path", name], ["uv", "python", "find", version]):
        if shutil.which(command[0]):
            found += subprocess.run(command, capture_output=True, text=True).stdout.split()
    for python in found:
        if python is None:
            continue
        # pyenv puts a name on the PATH for versions that it then refuses.
        said = subprocess.run(
            [python, "-c", "import sys; print(*sys.version_info[:2], sep='.')"], capture_output=True, text=True
        )
        if said.returncode == 0 and said.stdout.strip() == version:
            return python
    return None


def make(python: str, folder: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment with these requirements, in the versions of the lock where there is one."""
    own, ready, locked = folder / "bin" / "python", folder / "ready", LOCK.exists()
    text = "\n".join([*requirements, LOCK.read_text() if locked else ""])
    if not ready.exists() or ready.read_text() != text:
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        versions = ["--constraint", LOCK] if locked else []
        subprocess.run([own, "-m", "pip", "install", "--quiet", *versions, *requirements], check=True)
        ready.write_text(text)
    return own


def main() -> int:
    folder, failed, ran = Path(sys.argv[1]), [], 0
    for version, pyav in PYAV.items():
        python = find(version)
        if python is None:
            print(f"Python {version} is not on this machine: left out", flush=True)
            continue
        own, ran = make(python, folder / version, (pyav, *OTHERS)), ran + 1
        says = [own, "-c", "import sys, av; print(f'Python {sys.version.split()[0]}, PyAV {av.__version__}')"]
        subprocess.run(says, check=True)
        tests = [str(ROOT / "tests" / name) for name in TESTS]
        for command in ([own, "-c", CHECK], [own, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", *tests]):
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(f"Python {version} with {pyav}")
                break
    if failed:
        print(f"tests of reading video failed on {' and '.join(failed)}")
    if not ran:
        print(f"none of Python {', '.join(PYAV)} is on this machine")
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
