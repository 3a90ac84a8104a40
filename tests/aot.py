"""python tests/aot.py: what the Triton kernels need on sm_80, sm_90 and sm_120, with no GPU and no driver.

The step of a layer, and that of the norm before it, are launched on meta tensors. Instead of running, each kernel is
compiled as that launch would have it, and triton's own tools read registers, stack (spills), shared memory and matrix
instructions. The last line is JSON. With --all, many ranks, shapes and dtypes: some four minutes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, MockTensor  # noqa: E402

from minift.ops import lora_triton, lora_triton_gemm, lora_triton_tiles, norm_triton  # noqa: E402
from minift.ops.lora_triton_tiles import Gpu  # noqa: E402

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
GPUS = {80: Gpu(108, 163), 90: Gpu(132, 227), 120: Gpu(170, 99)}  # A100, H100, GeForce RTX 5090
QV = (0, 1536)


class Case(NamedTuple):
    cc: int
    kernel: str
    dtype: torch.dtype
    M: int
    K: int
    N: int
    offsets: tuple[int, ...]
    rank: int
    dropout: float
    only: tuple[str, ...] = ()  # the kernels to compile, else all


BF16 = torch.bfloat16
LARGE = ("gemm_kernel", "persistent_kernel")
NORM = ("add_norm_kernel", "add_norm_backward_kernel")
CASES = [
    Case(90, "hybrid", BF16, 8192, 768, 2304, QV, 8, 0.1),
    Case(90, "triton", BF16, 8192, 768, 2304, QV, 8, 0.1, LARGE),  # narrow tiles
    Case(90, "triton", BF16, 8192, 4096, 4096, (0,), 64, 0.0, LARGE),  # wide tiles
    Case(90, "persistent", BF16, 8192, 4096, 4096, (0,), 16, 0.0, LARGE),
    Case(80, "triton", torch.float16, 8192, 768, 3072, (0,), 16, 0.1, (*LARGE, *NORM, "shrink_kernel")),
    Case(120, "triton", BF16, 8192, 4096, 4096, (0,), 16, 0.1, (*LARGE, *NORM, "expand_kernel")),
    Case(80, "hybrid", BF16, 2048, 1601, 1601, (0,), 8, 0.1, ("shrink_kernel", "augment_kernel")),  # no multiple of 16
]
SHAPES = ((768, 2304, QV), (3072, 768, (0,)), (1601, 1601, (0,)), (4096, 4096, (0,)))
ALL = [Case(cc, "triton", BF16, 8192, K, N, offsets, rank, dropout) for cc in GPUS for K, N, offsets in SHAPES
       for rank in (8, 32, 64, 256) for dropout in (0.0, 0.1)]
ALL += [Case(cc, "triton", torch.float32, 2048, K, N, offsets, 64, 0.1) for cc in GPUS for K, N, offsets in SHAPES[:3]]
ALL += [Case(cc, "hybrid", dtype, 2048, K, N, offsets, rank, 0.1) for cc in GPUS for K, N, offsets in SHAPES[:3]
        for dtype, rank in ((BF16, 8), (BF16, 256), (torch.float32, 64))]
ALL += [Case(90, "persistent", BF16, 8192, K, N, offsets, rank, 0.0, LARGE) for K, N, offsets in SHAPES
        for rank in (8, 32, 64, 256)]


def launches(cases: list[Case]) -> dict[tuple, JITFunction]:
    """{(compute capability, name, signature, constants, options, divisible): kernel} of a step of every case, each
    once."""
    found: dict[tuple, JITFunction] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        signature, constants, divisible = {}, {}, []
        for i, name in enumerate(kernel.arg_names):
            value, constant = named[name], kernel.params[i].is_constexpr
            value = torch.empty(0, dtype=value.dtype) if isinstance(value, MockTensor) else value  # of a warm-up
            if constant or value is None or type(value) is int and value == 1:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + NAMES[value.dtype]
                divisible.append(i)
            else:
                signature[name] = "fp32" if type(value) is float else "i32"
                if type(value) is int and value % 16 == 0:
                    divisible.append(i)
        parts = (tuple(part.items()) for part in (signature, constants, options))
        if not case.only or kernel.fn.__name__ in case.only:
            found[case.cc, kernel.fn.__name__, *parts, tuple(divisible)] = kernel

    JITFunction.run = record
    lora_triton.is_possible = lambda x, weight: x.itemsize == 2 and not (len(weight) | x.shape[1]) % 8
    for case in cases:
        lora_triton_tiles.WITHOUT_GPU = GPUS[case.cc]
        run_step(case)
    lora_triton_gemm.compile_small_product()  # the test for Triton that `--kernel` makes
    return found


def run_step(case: Case) -> None:
    _, kernel, dtype, M, K, N, offsets, rank, dropout, _ = case
    P, n = len(offsets), N // (3 if len(offsets) == 2 else 1)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight = empty(M, K), empty(N, K)
    A, B = empty(P * rank, K), empty(P * n, rank)
    settings = list(offsets), 2.0, dropout, empty(dtype=torch.int64) if dropout else None
    y, h = lora_triton.forward(x, weight, empty(N), A, B, *settings, kernel)
    lora_triton.backward(y, x, weight, A, B, h, *settings, True, kernel)
    norm_triton.forward(x, x, empty(K), empty(K), 1e-5)
    for dtotal in (x, None):
        norm_triton.backward(dtotal, x, x, empty(K), 1e-5)


def needs(kernel: JITFunction, key: tuple) -> dict[str, Any]:
    cc, name, signature, constants, options, divisible = key
    index = {argument: i for i, argument in enumerate(kernel.arg_names)}
    source = ASTSource(fn=kernel, signature=dict(signature),
                       constexprs={(index[n],): value for n, value in constants},
                       attrs={(i,): [["tt.divisibility", 16]] for i in divisible})
    made = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(options))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.asm["cubin"])
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True,
                               check=True).stdout
    ptx = made.asm["ptx"]
    return {"kernel": name, "cc": cc, "dtype": next(kind for _, kind in signature if kind[0] == "*"),
            "constants": dict(constants), "options": dict(options),
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
            "shared": made.metadata.shared, "limit": GPUS[cc].shared_kib * 1024,
            "wgmma": ptx.count("wgmma.mma_async"), "mma": ptx.count("mma.sync"),
            "descriptors": ptx.count("cp.async.bulk.tensor"),
            "waits": [int(n) for n in re.findall(r"(?:cp.async|wgmma).wait_group(?:.sync.aligned)?\s+(\d+)", ptx)]}


if __name__ == "__main__":
    chosen = launches(ALL if "--all" in sys.argv else CASES)
    results = []
    for key, kernel in chosen.items():
        results.append(needs(kernel, key))
        print(results[-1], file=sys.stderr, flush=True)
    print(json.dumps(results))
