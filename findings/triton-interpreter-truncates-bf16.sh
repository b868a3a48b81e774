#!/usr/bin/env bash
# triton 3.9.0 with TRITON_INTERPRET=1: a cast of float32 to bfloat16 cuts the lower 16 bits off. Compiled code rounds to
# the nearest (PTX: cvt.rn.bf16.f32), as torch does. So a kernel that is right on a GPU is off by up to one step of
# bfloat16 in the interpreter, and always towards zero.
#
# Fails where that changes: then results in bfloat16 may be compared to the bit.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 triton==3.9.0 numpy
cat > "$folder/run.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(y + at, tl.load(x + at).to(tl.bfloat16))


# The steps of bfloat16 above 1 are 4 / 512: the first two numbers are nearer to 1 + 4 / 512, the third to 1.
x = torch.tensor([1 + 3.5 / 512, -1 - 3.5 / 512, 1 + 0.5 / 512, 1 + 1 / 128])
y = torch.empty(4, dtype=torch.bfloat16)
cast[(1,)](x, y, 4)
bits = x.view(torch.int32) & -65536
print("triton", triton.__version__, "interpreter", y.tolist(), "torch", x.bfloat16().tolist())
assert torch.equal(y.float(), bits.view(torch.float32)), "no longer cut off"
assert not torch.equal(y, x.bfloat16()), "rounds as torch now"
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/run.py"
