"""The single steps of a layer with a low-rank update: its two large products and each small kernel, beside the least
time that the machine's measured rates allow.

A step cannot be faster than its FLOPs at the rate of large products, nor than its bytes at the rate of a large copy:
the larger of the two times is its floor. Letters as in minift/ops/lora.py; J = P r, the columns of h.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from minift.bench.layers import SCALE, Case, Layer
from minift.bench.timing import time_in_turn

COLUMNS = {
    "part": ("part", str),
    "ms": ("ms", "{:.4f}".format),
    "floor_ms": ("floor", "{:.4f}".format),
    "over_floor": ("/ floor", "{:.2f}".format),
    "flops_per_second": ("TFLOP/s", lambda rate: f"{rate / 1e12:.0f}"),
    "bytes_per_second": ("GB/s", lambda rate: f"{rate / 1e9:.0f}"),
}
WIDTHS = [24, 8, 8, 7, 7, 6]


@dataclass(frozen=True)
class Part:
    """A step of a layer's training pass. `run` computes it for one layer of the ring."""

    run: Callable[[Layer], Any]
    flops: int
    nbytes: int  # that it must read and write


def products(case: Case, itemsize: int) -> dict[str, Part]:
    """The two large products by torch (cuBLAS on a GPU), without the update."""
    M, N, K = case.M, case.N, case.K
    flops, nbytes = 2 * M * N * K, itemsize * (M * K + M * N + N * K)
    return {
        "y = x W^T, torch": Part(lambda layer: F.linear(layer["x"], layer["weight"], layer["bias"]), flops, nbytes),
        "dx = dy W, torch": Part(lambda layer: layer["dy"] @ layer["weight"], flops, nbytes),
    }


def kernels(case: Case, itemsize: int, usable: list[str]) -> dict[str, Part]:
    """Every Triton kernel of the usable values of --kernel alone, on h and g that the layer's ring holds."""
    from minift.ops import lora_triton, norm_triton
    from minift.ops.lora_triton_hybrid import add_update, augment, augmented_width
    M, N, K, dropout, offsets = case.M, case.N, case.K, case.dropout, case.offsets
    J, outputs = case.rank * len(offsets), case.part_size * len(offsets)
    width = augmented_width(K, J)

    def shrink(layer: Layer) -> None:
        lora_triton.shrink(layer["x"], layer["a"], SCALE, dropout, layer["seed"], layer["h"])

    def gemm(layer: Layer) -> None:
        lora_triton.gemm(layer["x"], layer["weight"], layer["bias"], layer["h"], layer["b"], offsets, 0.0, None)

    def expand(layer: Layer) -> None:
        lora_triton.expand(layer["dy"], layer["b"], layer["h"], offsets, SCALE)

    def outer(layer: Layer) -> None:
        lora_triton.outer(layer["x"], layer["h"], dropout, layer["seed"])

    def thin_gradients(layer: Layer) -> None:
        g, dB = lora_triton.expand(layer["dy"], layer["b"], layer["h"], offsets, SCALE)
        dA = lora_triton.outer(layer["x"], g, dropout, layer["seed"])
        lora_triton.add_two(dA, dB)  # expand and outer give the summands of chunks of tokens

    def gemm_dx(layer: Layer) -> None:
        lora_triton.gemm(layer["dy"], layer["weight"].T, None, layer["h"], layer["a"].T, (0,), dropout, layer["seed"])

    def shrink_copy(layer: Layer) -> None:
        x_copy = layer["x"].new_empty(M, width)
        lora_triton.shrink(layer["x"], layer["a"], SCALE, dropout, layer["seed"], layer["h"], x_copy)

    def add_norm(layer: Layer) -> None:
        scale = layer["a"][0]  # (K,), as its bias too
        norm_triton.add_norm(layer["x"], layer["dx"], scale, scale, 1e-5)

    def add_norm_backward(layer: Layer) -> None:
        norm_triton.add_norm_backward(layer["dx"], layer["x"], layer["x"], layer["a"][0], 1e-5)

    flops, nbytes = 2 * M * N * K, itemsize * (M * K + M * N + N * K + M * J)
    thin_in, thin_out = 2 * M * J * K, 2 * M * case.rank * outputs
    expand_bytes = itemsize * (M * outputs + 2 * M * J) + 4 * outputs * case.rank  # dA and dB are in fp32
    outer_bytes = itemsize * (M * K + M * J) + 4 * J * K
    def persistent(layer: Layer) -> None:
        lora_triton.product("persistent", layer["x"], layer["weight"], layer["bias"], layer["h"], layer["b"], offsets)

    def persistent_dx(layer: Layer) -> None:
        lora_triton.product("persistent", layer["dy"], layer["weight"].T, None, layer["h"], layer["a"].T, (0,))

    found = {
        "y = x W^T + h B^T, gemm": Part(gemm, flops + thin_out, nbytes),
        "dx = dy W + g A, gemm": Part(gemm_dx, flops + thin_in, nbytes),
        "h = x A^T, shrink": Part(shrink, thin_in, itemsize * (M * K + K * J + M * J)),
        "g and dB, expand": Part(expand, 2 * thin_out, expand_bytes),
        "dA = g^T x, outer": Part(outer, thin_in, outer_bytes),
        "g, dB, dA and sums": Part(thin_gradients, 2 * thin_out + thin_in, expand_bytes + outer_bytes),
        # the norm before the layer
        "x + branch and norm": Part(add_norm, 0, itemsize * 4 * M * K),
        "dx of branch, norm": Part(add_norm_backward, 0, itemsize * 3 * M * K),  # x is read twice, once from a cache
        # of the hybrid
        "[x, h], shrink": Part(shrink_copy, thin_in, itemsize * (M * K + K * J + M * width)),
        "[W, B], augment": Part(lambda layer: augment(layer["weight"], layer["b"], offsets, width), 0,
                                itemsize * (N * K + outputs * case.rank + N * width)),
        # dx is added to again and again, so g is 0 here
        "dx += g A, add": Part(lambda layer: add_update(layer["dx"], layer["g"], layer["a"], dropout, layer["seed"]),
                               thin_in, itemsize * (2 * M * K + M * J + J * K)),
    }
    if "persistent" in usable:
        found["y, persistent"] = Part(persistent, flops + thin_out, nbytes)
        if not dropout:  # with a mask, dx is that of the hybrid
            found["dx, persistent"] = Part(persistent_dx, flops + thin_in, nbytes)
    return found


def measure(case: Case, ring: list[Layer], usable: list[str], samples: int, facts: dict[str, Any]
            ) -> Iterator[dict[str, Any]]:
    """The results of a case, one for each part. usable: the values of --kernel that can run here."""
    itemsize, device = ring[0]["x"].element_size(), ring[0]["x"].device
    parts = products(case, itemsize)
    ring = [{name: tensor.detach() for name, tensor in layer.items()} for layer in ring]
    if "triton" in usable:
        parts |= kernels(case, itemsize, usable)
        for layer in ring:
            layer["h"] = layer["x"] @ layer["a"].T
            layer["dx"], layer["g"] = torch.zeros_like(layer["x"]), torch.zeros_like(layer["h"])
            layer["seed"] = torch.zeros((), dtype=torch.int64, device=device)
    works = {}
    for name, part in parts.items():
        next_layer = itertools.cycle(ring).__next__
        works[name] = functools.partial(run_next, part, next_layer)
    for name, times in time_in_turn(works, samples, device).items():
        part, seconds = parts[name], statistics.median(times)
        floor = max(part.flops / facts["flops_per_second"], part.nbytes / facts["bytes_per_second"])
        yield {"part": name, **asdict(case), "ms": seconds * 1e3, "floor_ms": floor * 1e3,
               "over_floor": seconds / floor, "flops_per_second": part.flops / seconds,
               "bytes_per_second": part.nbytes / seconds}


def run_next(part: Part, next_layer: Callable[[], Layer]) -> None:
    part.run(next_layer())
