"""The layers that `python -m minift.bench kernels` measures: a frozen linear layer with a low-rank update, in
every implementation that can run here."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minift.errors import UserError
from minift.ops.kernel_choice import KERNELS, check_kernel
from minift.ops.lora import lora_linear

SCALE = 2.0
MAX_RING = 256  # the most layers in a ring: very small layers would need thousands to fill the cache
OUR_KERNELS = [kernel for kernel in KERNELS if kernel != "auto"]
NAMES = {
    "frozen": "frozen linear",  # without an update
    "eager": "eager, as loralib",
    "compile": "torch.compile",  # of the eager form, with max-autotune
    "peft": "PEFT's layer",
    # this project's, under the names of --kernel
    "torch": "Function + addmm",
    "triton": "Triton",
    "hybrid": "cuBLAS + Triton",
    "persistent": "persistent Triton",
}
Layer = dict[str, Tensor]
Forward = Callable[[Layer], tuple[Tensor, list[Tensor]]]  # layer -> the output, and the tensors that get a gradient


@dataclass(frozen=True)
class Case:
    """A layer to measure."""

    K: int  # inputs
    N: int  # outputs
    M: int  # tokens
    rank: int
    dropout: float
    parts: str = ""  # "qv": of a fused matrix of q, k and v, these are updated; empty: all outputs are one part

    @property
    def part_size(self) -> int:
        return self.N // 3 if self.parts else self.N

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first output of each part."""
        return tuple("qkv".index(part) * self.part_size for part in self.parts) or (0,)

    def work(self, row: str, itemsize: int) -> tuple[int, int]:
        """FLOPs of a forward and a backward pass, and the bytes that every implementation must read and write."""
        M, N, K = self.M, self.N, self.K
        flops = 2 * (2 * M * N * K)  # y = x W^T and dx = dy W
        nbytes = 2 * itemsize * (M * K + M * N + N * K)  # x, y and W, then dx, dy and W
        if row == "frozen":
            return flops, nbytes
        rank = self.rank * len(self.offsets)
        update = 2 * M * rank * (K + self.part_size)  # x A^T and h B^T
        # the update again for the gradients of its inputs and of A and B; x is read once more for the gradient of A
        return flops + 3 * update, nbytes + itemsize * M * K

    def __str__(self) -> str:
        parts = f"/{self.parts}" if self.parts else ""
        return f"{self.K} x {self.N}{parts}, {self.M:,} tokens, rank {self.rank}, dropout {self.dropout:g}"


def ring_size(case: Case, itemsize: int, nbytes: int) -> int:
    """The layers of a ring of at least `nbytes`: at least 2, at most MAX_RING."""
    M, N, K = case.M, case.N, case.K
    update = len(case.offsets) * case.rank * (K + case.part_size)  # A and B, once in fp32
    layer_bytes = itemsize * (M * K + M * N + N * K + N + update) + 4 * update
    return min(max(2, math.ceil(nbytes / layer_bytes)), MAX_RING)


def make_ring(case: Case, dtype: torch.dtype, device: torch.device, nbytes: int) -> list[Layer]:
    """Layers with their inputs, of at least `nbytes` together, but at most MAX_RING layers. All have the same random
    values. Each has its own memory, so a layer has left the cache when it is used again."""
    parts = len(case.offsets)
    A = torch.randn(parts * case.rank, case.K, device=device) / math.sqrt(case.K)
    B = torch.randn(parts * case.part_size, case.rank, device=device) / 10
    first = {
        "x": torch.randn(case.M, case.K, device=device).to(dtype),
        "dy": torch.randn(case.M, case.N, device=device).to(dtype),
        "weight": (torch.randn(case.N, case.K, device=device) / math.sqrt(case.K)).to(dtype),
        "bias": torch.randn(case.N, device=device).to(dtype),
        "A": A, "B": B,  # fp32, as in this project
        "a": A.to(dtype), "b": B.to(dtype),  # in the compute dtype, as in loralib and PEFT
    }
    ring = []
    for _ in range(ring_size(case, dtype.itemsize, nbytes)):
        layer = {}
        for name, tensor in first.items():
            layer[name] = tensor.clone().requires_grad_(name in ("x", "A", "B", "a", "b"))
        ring.append(layer)
    return ring


def eager(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, dropout: float,
          offsets: tuple[int, ...]) -> Tensor:
    """loralib's forward: Linear, and for parts MergedLinear with its zero_pad (loralib/layers.py)."""
    y = F.linear(x, weight, bias)  # (M, N)
    h = F.dropout(x, dropout) @ a.T  # (M, parts * r)
    if len(b) == len(weight) and len(offsets) == 1:
        return y + (h @ b.T) * SCALE
    # MergedLinear builds the update of all outputs, with zeros for the parts without one
    update = torch.zeros_like(y)
    for start, h_part, b_part in zip(offsets, h.chunk(len(offsets), 1), b.chunk(len(offsets)), strict=True):
        update[:, start : start + len(b_part)] = h_part @ b_part.T
    return y + update * SCALE


def peft_layers(ring: list[Layer], case: Case) -> dict[int, torch.nn.Module]:
    """{id of a layer: PEFT's module for it}, with A and B in the compute dtype."""
    import peft
    modules = {}
    for layer in ring:
        linear = torch.nn.Linear(case.K, case.N, device="meta")  # no memory: it gets the weight of the layer
        linear.weight = torch.nn.Parameter(layer["weight"], requires_grad=False)
        linear.bias = torch.nn.Parameter(layer["bias"], requires_grad=False)
        config = peft.LoraConfig(r=case.rank, lora_alpha=SCALE * case.rank, lora_dropout=case.dropout,
                                 target_modules=["0"])
        model = peft.get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
        module = model.base_model.model[0]
        module.lora_A["default"].weight.data = layer["a"].data
        module.lora_B["default"].weight.data = layer["b"].data
        modules[id(layer)] = module.train()
    return modules


def forward_of(row: str, case: Case, ring: list[Layer]) -> Forward:
    """The forward pass of an implementation: layer -> the output, and the tensors that get a gradient."""
    modules = peft_layers(ring, case) if row == "peft" else {}
    call = eager
    if row == "compile":
        # without its own CUDA graphs: every implementation is captured in the same way here
        call = torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs")

    def frozen(layer: Layer) -> tuple[Tensor, list[Tensor]]:
        return F.linear(layer["x"], layer["weight"], layer["bias"]), [layer["x"]]

    def in_eager_form(layer: Layer) -> tuple[Tensor, list[Tensor]]:
        x, a, b = layer["x"], layer["a"], layer["b"]
        return call(x, layer["weight"], layer["bias"], a, b, case.dropout, case.offsets), [x, a, b]

    def by_peft(layer: Layer) -> tuple[Tensor, list[Tensor]]:
        x, module = layer["x"], modules[id(layer)]
        return module(x), [x, module.lora_A["default"].weight, module.lora_B["default"].weight]

    def ours(layer: Layer) -> tuple[Tensor, list[Tensor]]:
        x, A, B = layer["x"], layer["A"], layer["B"]
        y = lora_linear(x, layer["weight"], layer["bias"], A, B, SCALE, case.offsets, case.dropout, row)
        return y, [x, A, B]

    forwards = {"frozen": frozen, "eager": in_eager_form, "compile": in_eager_form, "peft": by_peft}
    return forwards.get(row, ours)


def training_pass(forward: Forward, layers: list[Layer]) -> None:
    """The forward passes of all layers, then the backward passes in reverse order, as in a training step: what a layer
    has read and written has then left the cache before its backward pass."""
    outputs = [forward(layer) for layer in layers]
    for layer in reversed(layers):
        y, leaves = outputs.pop()
        torch.autograd.grad(y, leaves, layer["dy"])


def find_rows(chosen: list[str], device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those of the chosen implementations that can be measured here, and the reason for each that cannot."""
    missing = {}
    if importlib.util.find_spec("peft") is None:
        missing["peft"] = "peft is not installed"
    for kernel in OUR_KERNELS:
        try:
            check_kernel(kernel, device)
        except UserError as error:
            missing[kernel] = str(error)
        else:
            if kernel != "torch" and device.type != "cuda":
                missing[kernel] = "Triton's interpreter, which runs here, is no measure of speed"
    missing = {row: why for row, why in missing.items() if row in chosen}
    return [row for row in chosen if row not in missing], missing
