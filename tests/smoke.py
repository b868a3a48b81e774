"""In a fresh environment, outside of the checkout: the Kernel Hub folder without the package, the wheel, and both.

python tests/smoke.py "torch==2.13.0" requirements.lock hub/ppllava-kernels dist/ppllava_kernels-0.1.0-....whl
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

SCRIPT = """
import sys
import torch
import ppllava_kernels
from ppllava_kernels import prompt_guided_pool3d, prompt_relevance, weighted_pool3d

assert ppllava_kernels.why_not("cpp") is None, ppllava_kernels.why_not("cpp")
assert "triton" not in sys.modules and "transformers" not in sys.modules
# float64: at temperature 0.01 the rounding of float32 becomes a difference that depends on the processor
generator = torch.Generator().manual_seed(0)
values, image, text = (
    torch.randn(shape, dtype=torch.float64, generator=generator)
    for shape in ((1, 4, 6, 6, 32), (1, 4, 6, 6, 16), (1, 16))
)
expected = prompt_guided_pool3d(values, image, text, kernel_size=(2, 3, 3), backend="reference")
pooled = prompt_guided_pool3d(values, image, text, kernel_size=(2, 3, 3), backend="cpp")
torch.testing.assert_close(pooled, expected)
pooled = weighted_pool3d(values, prompt_relevance(image, text), kernel_size=(2, 3, 3))
torch.testing.assert_close(pooled, expected)
print("smoke test passed:", ppllava_kernels.__file__, ppllava_kernels.compatible_backends(values))
"""


def main(torch: str, lock: str, hub: str, wheel: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"

        def install(*packages: str) -> None:
            command = [python, "-m", "pip", "install", "--quiet", "--constraint", Path(lock).resolve()]
            for package in packages:
                subprocess.run([*command, package], check=True)

        load = [python, Path(__file__).with_name("hub_smoke.py").resolve(), Path(hub).resolve()]
        install(torch, "kernels")
        subprocess.run(load, cwd=folder, check=True)
        install(str(Path(wheel).resolve()))
        subprocess.run([python, "-c", SCRIPT], cwd=folder, check=True)
        subprocess.run(load, cwd=folder, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
