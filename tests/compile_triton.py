"""Compile every Triton kernel for GPUs that are not here, with the arguments of real calls; print one JSON line each.

Run by test_triton_compile.py in a process of its own, since TRITON_INTERPRET must be unset when a kernel is defined.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ppllava_kernels.backends.triton import backend, guide_relevance, hidden_pool3d, prompt_relevance, weighted_pool3d
from ppllava_kernels.shapes import make_window

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def describe(kernel, arguments):
    """signature, constants and attributes, as Triton's own launcher derives them from arguments."""
    signature, constants, attributes = {}, {}, {}
    for n, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif type(value) is int:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, constants, attributes


def resources(cubin: bytes) -> dict:
    """Registers and bytes of stack, where spilled registers go, that the compiled kernel asks for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = cuobjdump("--dump-resource-usage", file.name)
        usage = {name: int(re.search(rf"{name}:(\d+)", report).group(1)) for name in ("REG", "STACK", "LOCAL")}
        stack = usage["STACK"] + usage["LOCAL"]
        if stack and not re.search(r"\b(STL|LDL)\b", cuobjdump("-sass", file.name)):
            stack = 0  # ptxas sometimes asks for one that no instruction touches
    return dict(registers=usage["REG"], stack=stack)


def cuobjdump(*arguments: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def loads(ptx: str) -> dict:
    """The bytes of the widest load from global memory and of the widest store."""
    width = {}
    for kind, instruction in dict(load=r"ld\.global\S*", store=r"st\.global\S*").items():
        found = re.findall(instruction + r"\.v(\d)\.b(\d+)", ptx)
        width[kind] = max((int(n) * int(bits) // 8 for n, bits in found), default=0)
    if "cp.async.cg" in ptx:  # to shared memory, always 16 bytes
        width["load"] = 16
    return width


def rounding(ptx: str) -> str:
    """How float32 becomes 16 bits: the modes of all such conversions, as rn for the nearest, ties to even."""
    return " ".join(sorted(set(re.findall(r"cvt\.(\w+)(?:\.\w+)*\.(?:bf16|f16)(?:x2)?\.f32", ptx))))


def calls(dtype, few: bool):
    """Every op, forward and backward, at the sizes of the 7B model; on the CPU, since nothing is run.

    few: each kernel, without those that differ in nothing but their windows.
    """
    d, c, v = 4096, 768, 1024
    weights_of = dict(norm=torch.empty(v, dtype=dtype), guide=torch.empty(c, v, dtype=dtype))
    linear, bias = torch.empty(d, v, dtype=dtype), torch.empty(d, dtype=dtype)
    for cu_frames in (None, torch.tensor([0, 2, 6], dtype=torch.int32)):
        lead = (1, 4) if cu_frames is None else (6,)
        batch = 1 if cu_frames is None else 2
        values = torch.empty(*lead, 24, 24, d, dtype=dtype)
        image = torch.empty(*lead, 24, 24, c, dtype=dtype)
        text, scale = torch.empty(batch, c, dtype=dtype), torch.empty(())
        weights = torch.empty(values.shape[:-1])
        features = torch.empty(*lead, 24, 25, v, dtype=dtype)[..., 1:, :]  # as after a class token
        norm, guide = weights_of.values()
        backend.guide_relevance(features, text, scale, 1.0, norm, norm, 1e-5, guide, cu_frames)
        backend.prompt_relevance(image, text, scale, 1.0, cu_frames)
        backend.prompt_relevance_backward(weights, weights, image, text, scale, 1.0, cu_frames)
        windows = [make_window((2, 3, 3)), make_window(None, None, (2, 7, 8)), make_window((2, 3, 3), (1, 2, 2))]
        for window in windows[: 1 if few else 3 if cu_frames is None else 2]:
            pooled = backend.weighted_pool3d(values, weights, window, 0.01, cu_frames)
            backend.weighted_pool3d(values, None, window, 0.01, cu_frames)
            backend.prompt_guided_pool3d(values, image, text, scale, 1.0, window, 0.01, cu_frames)
            backend.weighted_pool3d_backward(pooled, values, weights, window, 0.01, cu_frames, True, True)
            backend.weighted_pool3d_backward(pooled, values, None, window, 0.01, cu_frames, True, False)
            if len(window.stride) and window.stride != window.kernel_size:
                continue
            for scores in (weights, None) if window == windows[0] else (weights,):
                hidden = backend.hidden_pool3d(features, scores, linear, bias, window, 0.01, cu_frames)
                plan = hidden_pool3d.make_plan(features, window, cu_frames)
                shares = hidden_pool3d.window_shares(features, scores, 0.01, plan)
                tile, grad = torch.empty(576, 2048, dtype=dtype), hidden.view(-1, d)
                dots = None if scores is None else shares
                hidden_pool3d.pool_hidden_backward(tile, bias[:2048], shares, dots, grad, 576, 0, features, plan)
            hidden_pool3d.window_shares_backward(weights, shares, shares, features, 0.01, plan)


def main(arch: str, dtype: str) -> None:
    """arch: 90 for sm_90, or gfx942."""
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch), 32)
    seen = set()

    def compile_only(kernel, programs, device, arguments, tile):
        signature, constants, attributes = describe(kernel, arguments)
        key = repr((kernel.__name__, signature, constants, attributes))
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = dict(num_warps=tile.warps, enable_fp_fusion=True)
        if target.backend == "cuda":
            options |= dict(maxnreg=tile.registers)
        compiled = triton.compile(source, target=target, options=options)
        usage = {}
        if "cubin" in compiled.asm:
            ptx = compiled.asm["ptx"]
            usage = resources(compiled.asm["cubin"]) | loads(ptx) | dict(rounding=rounding(ptx))
        row = dict(kernel=kernel.__name__, arch=arch, dtype=dtype, shared=compiled.metadata.shared, **usage)
        print(json.dumps(row | {k: v for k, v in constants.items() if k.isupper()}), flush=True)

    backend.why_not = lambda *tensors: None  # nothing is run
    for module in (guide_relevance, hidden_pool3d, prompt_relevance, weighted_pool3d):
        module.launch = compile_only
    calls(getattr(torch, dtype), few=target.backend == "hip")


if __name__ == "__main__":
    main(*sys.argv[1:])
