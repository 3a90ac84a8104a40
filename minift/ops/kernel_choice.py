"""Which implementation computes the low-rank update: `--kernel`.

torch is the Function of lora.py. The others are in lora_triton.py, and run on NVIDIA GPUs alone: triton adds the update
inside a matrix product in Triton, persistent does so in one for Hopper (sm_90), and hybrid leaves the large products to
cuBLAS. With these, norm.py uses its kernels too. `auto` follows kernel_rule.json, which a benchmark writes with
`write_rule`, and leaves the norms to torch.
"""

import functools
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minift.errors import UserError

KERNELS = ("auto", "torch", "triton", "hybrid", "persistent")
RULE_FILE = Path(__file__).with_name("kernel_rule.json")  # its "about" describes the format
# The classes of layers, each from one number to below the next. With fewer than 512 inputs or tokens, little is gained.
K_BOUNDS = (512, 1024, 2048, 4096)
TOKEN_BOUNDS = (512, 2048, 8192)
GRAPH_RATIO, EAGER_RATIO = 0.97, 1.0  # an implementation wins a class below both


def check_kernel(name: str, device: torch.device) -> None:
    """Raises UserError if `--kernel name` cannot run on the device."""
    if name in ("auto", "torch"):
        return
    reason = why_no_triton(device)
    if name == "persistent" and not reason and device.type == "cuda" and gpu_generation(device) != "sm_90":
        reason = f"it is for sm_90 (H100, H200), and this GPU is {gpu_generation(device)}"
    if reason:
        raise UserError(f"--kernel {name}: {reason}; leave it out")


@functools.cache
def why_no_triton(device: torch.device) -> str | None:
    """The reason why the Triton kernels cannot run on the device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter runs on any device, slowly: for tests
    if device.type != "cuda" or torch.version.cuda is None:
        found = "ROCm" if torch.version.hip else device.type
        return f"the kernels need an NVIDIA GPU, and the device is {found}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability 8.0, and {name} is older"
    try:  # Triton also needs a C compiler and the driver's headers
        from minift.ops import lora_triton_gemm
        with torch.cuda.device(device):
            lora_triton_gemm.compile_small_product()
    except Exception as error:
        return f"triton cannot compile here: {type(error).__name__}: {error}"
    return None


# ---- the rule of `auto`

@functools.cache
def gpu_generation(device: torch.device) -> str:
    """sm_90 for an H100 or H200. Every LoRA layer asks for it in every pass, so it is cached."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose(kernel: str, x: Tensor, rank: int, dropout: float) -> str:
    """The implementation for x (M, K): `kernel` itself, and for auto that of the rule."""
    if kernel != "auto":
        return kernel
    classes = read_rule(RULE_FILE)
    # bf16 and fp16 alone are measured. In fp32 products are bound by arithmetic, and the update costs little.
    if not classes or not x.is_cuda or x.itemsize != 2 or why_no_triton(x.device):
        return "torch"
    M, K = x.shape
    measured = classes.get(shape_class(gpu_generation(x.device), K, rank, dropout, M))
    return measured["kernel"] if measured else "torch"


def shape_class(gpu: str, K: int, rank: int, dropout: float, tokens: int) -> str:
    """The name of a layer's class in kernel_rule.json. gpu: as `gpu_generation` says; rank: that of one part."""
    padded_rank = max(16, 2 ** (rank - 1).bit_length())  # a matrix instruction takes 16 columns at least
    masked = "dropout" if dropout else "no dropout"
    return f"{gpu}, K {bounds_of(K, K_BOUNDS)}, rank {padded_rank}, {masked}, tokens {bounds_of(tokens, TOKEN_BOUNDS)}"


def bounds_of(value: int, bounds: tuple[int, ...]) -> str:
    """The class that a number belongs to: "512-1023", or "8192-" for the last."""
    first = max((bound for bound in bounds if bound <= value), default=0)
    last = min((bound - 1 for bound in bounds if bound > value), default="")
    return f"{first}-{last}"


@functools.cache
def read_rule(path: Path) -> dict[str, dict[str, Any]]:
    """{class: {"kernel": ..., "graph_ratio": ..., "eager_ratio": ..., "shapes": ...}}. Raises UserError."""
    classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
    for name, measured in classes.items():
        if measured["kernel"] not in KERNELS[1:]:
            raise UserError(f"{path}: {name!r} names the kernel {measured['kernel']!r}; it must be one of "
                            f"{', '.join(KERNELS[1:])}")
    return classes


def write_rule(path: Path, measurements: list[dict[str, Any]]) -> None:
    """Write the rule of the classes that were measured into the file; it keeps its other classes.

    A measurement: {"gpu": "sm_90", "K", "N", "parts": of the fused matrix that have an update, "n": outputs of a part,
    "rank", "dropout": rate, "tokens", "implementation": one of KERNELS without auto, "ms_graph", "ms_eager": forward
    and backward}. Shapes without a measurement of torch do not count.
    """
    rule = json.loads(path.read_text(encoding="utf-8"))
    for name, shapes in group_by_class(measurements).items():
        rule["classes"][name] = decide(shapes)
    rule["classes"] = dict(sorted(rule["classes"].items()))
    path.write_text(json.dumps(rule, indent=2) + "\n", encoding="utf-8")
    read_rule.cache_clear()


Times = dict[str, tuple[float, float]]  # {implementation: (ms_graph, ms_eager)} of a shape


def group_by_class(measurements: list[dict[str, Any]]) -> dict[str, list[Times]]:
    """{class: the times of each of its shapes}, for the shapes with a measurement of torch."""
    classes: dict[str, dict[tuple, Times]] = {}
    for one in measurements:
        name = shape_class(one["gpu"], one["K"], one["rank"], one["dropout"], one["tokens"])
        shape = tuple(one[key] for key in ("K", "N", "parts", "n", "rank", "dropout", "tokens"))
        times = classes.setdefault(name, {}).setdefault(shape, {})
        times[one["implementation"]] = one["ms_graph"], one["ms_eager"]
    grouped = {name: [times for times in shapes.values() if "torch" in times] for name, shapes in classes.items()}
    return {name: shapes for name, shapes in grouped.items() if shapes}


def decide(shapes: list[Times]) -> dict[str, Any]:
    """The entry of a class in the rule."""
    best = {"kernel": "torch", "graph_ratio": 1.0, "eager_ratio": 1.0, "shapes": len(shapes)}
    candidates = []
    for name in KERNELS[2:]:
        if all(name in times for times in shapes):  # one that was not measured everywhere cannot win
            graph = max(times[name][0] / times["torch"][0] for times in shapes)
            eager = max(times[name][1] / times["torch"][1] for times in shapes)
            wins = graph < GRAPH_RATIO and eager < EAGER_RATIO
            candidates.append((not wins, graph, eager, name))
    if candidates:
        loses, graph, eager, name = min(candidates)  # winners first, then the least time
        best |= {"kernel": "torch" if loses else name, "graph_ratio": round(graph, 3), "eager_ratio": round(eager, 3)}
    return best
