"""python tests/aot.py: what the Triton kernels need on sm_80 and sm_90, with no GPU and no driver.

A layer's step is launched on meta tensors. Instead of running, each kernel is compiled as that launch would
have it, and triton's own tools read registers, stack (spills), shared memory and matrix instructions.
The last line is JSON. With --all, many ranks, shapes and dtypes: some ten minutes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from minift.ops import lora_triton  # noqa: E402

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
QV = (0, 1536)
# dtype, M, K, N, offsets, rank, dropout
CASES = [(torch.bfloat16, 8192, 768, 2304, QV, 8, 0.1), (torch.float16, 8192, 4096, 4096, (0,), 64, 0.1),
         (torch.float32, 1000, 1600, 1600, (0,), 64, 0.1)]
ALL = [(dtype, M, K, N, offsets, rank, dropout)
       for dtype in (torch.bfloat16, torch.float32) for M in (512, 16384)
       for K, N, offsets in ((768, 2304, QV), (3072, 768, (0,)), (1601, 1601, (0,)))
       for rank in (8, 32, 64, 256) for dropout in (0.0, 0.1)]


def launches(cases: list[tuple]) -> dict[tuple, JITFunction]:
    """{(signature, constants, divisible, options): kernel} of a step of every case, each once."""
    found: dict[tuple, JITFunction] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        signature, constants, divisible = {}, {}, []
        for i, name in enumerate(kernel.arg_names):
            value, constant = named[name], kernel.params[i].is_constexpr
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
        found[kernel.fn.__name__, *parts, tuple(divisible)] = kernel

    JITFunction.run = record
    for dtype, M, K, N, offsets, rank, dropout in cases:
        P, n = len(offsets), N // (3 if len(offsets) == 2 else 1)

        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        x, weight = empty(M, K), empty(N, K)
        A, B = empty(P * rank, K, dtype=torch.float32), empty(P * n, rank, dtype=torch.float32)
        seed = empty(dtype=torch.int64) if dropout else None
        y, h = lora_triton.forward(x, weight, empty(N), A, B, list(offsets), 2.0, dropout, seed)
        lora_triton.backward(y, x, weight, A, B, h, list(offsets), 2.0, dropout, seed, True)
    return found


def needs(kernel: JITFunction, key: tuple, cc: int) -> dict[str, Any]:
    name, signature, constants, options, divisible = key
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
    return {"kernel": name, "cc": cc, "dtype": dict(signature)["x" if "x" in index else "dy"],
            "constants": str(constants), "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
            "shared": made.metadata.shared, "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
            "mma": made.asm["ptx"].count("mma.sync")}


if __name__ == "__main__":
    chosen = launches(ALL if "--all" in sys.argv else CASES)
    results = []
    for key, kernel in chosen.items():
        for cc in (80, 90):
            results.append(needs(kernel, key, cc))
            print(results[-1], file=sys.stderr, flush=True)
    print(json.dumps(results))
