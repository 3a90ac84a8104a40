"""LoRA (Hu et al. 2021): W stays frozen, and a low-rank update s B A beside it trains.

A starts with random values and B at zero, so the first step starts exactly from the base. This file chooses the layers
that get an update; `lora_linear` in minift/ops/lora.py computes it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT, Linear
from minift.modes.mode import Mode
from minift.ops.lora import lora_linear
from minift.options import option, parse_float, parse_int

# {module in a block: its target}; q, k and v are parts of the first
TARGET_MODULES = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc", "mlp.c_proj": "proj"}
TARGET_GROUPS = {"all": "q,k,v,o,fc,proj", "attention": "q,k,v,o", "mlp": "fc,proj"}
TARGETS = ("q", "k", "v", "qkv", "o", "fc", "proj")


@dataclass(frozen=True)
class Options:
    rank: int = option(8, "rank r of the update: beside a 512 x 64 matrix of 32,768 weights, r = 8 trains "
                          "4,608, 86 % fewer", least=1)
    alpha: float = option(16.0, "the update is scaled by alpha / rank, or as --scaling says", above=0)
    dropout: float = option(0.0, "dropout on the update's input", least=0, below=1)
    targets: str = option("all", "matrices that get an update, a comma list of q, k, v, o (attention's "
                                 "projection), fc, proj (the MLP's two), qkv (the fused matrix as one), all, "
                                 "attention, mlp")
    scaling: str = option("standard", "standard: alpha/rank; rslora: alpha/sqrt(rank) (Kalajdzievski 2023)",
                          choices=("standard", "rslora"))
    # Other ranks and alphas for some layers, such as "c_attn=4,h.0.mlp=0"; rank 0 leaves a layer out. PEFT folders have
    # them, and they have no flag.
    rank_pattern: str | None = option(None)
    alpha_pattern: str | None = option(None)


class LoRALinear(Linear):
    """A linear layer with a low-rank update of some of its outputs. It takes the weight and the bias of the base's
    layer, under the same names.

    Each updated part has `part_size` outputs, and `offsets` gives the first output of each part: for q and v of c_attn,
    `part_size` is C and `offsets` are (0, 2C).
    """

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float, offsets: tuple[int, ...],
                 part_size: int):
        super().__init__(base.in_features, base.out_features, device="meta")  # meta: no memory for a weight
        self.weight, self.bias = base.weight, base.bias
        device, parts = base.weight.device, len(offsets)
        self.lora_A = nn.Parameter(torch.empty(parts * rank, base.in_features, device=device))  # (parts r, in)
        self.lora_B = nn.Parameter(torch.zeros(parts * part_size, rank, device=device))  # (parts part_size, r)
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib: uniform within 1 / sqrt(in)
        self.scale, self.dropout, self.offsets, self.part_size = scale, dropout, offsets, part_size
        self.unmerged_weight: Tensor | None = None  # the base's weight while the update is merged into `weight`
        self.constant_AB: tuple[Tensor, Tensor] | None = None  # A and B in the compute dtype, see set_constant

    def forward(self, x: Tensor) -> Tensor:
        if self.unmerged_weight is not None:  # merged: the update is in the weight
            return super().forward(x)
        return self.updated(x, self.bias)

    def updated(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + s B A)^T + bias, (..., in) -> (..., out). Without the bias, a subclass can rescale the result."""
        A, B = self.constant_AB or (self.lora_A, self.lora_B)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, self.weight, bias, A, B, self.scale, self.offsets, dropout, self.kernel)

    def set_constant(self, constant: bool) -> None:
        """Keep A and B in the compute dtype, so that decoding does not cast them for every token."""
        dtype = self.weight.dtype
        self.constant_AB = (self.lora_A.to(dtype), self.lora_B.to(dtype)) if constant else None

    def full_B(self) -> Tensor:
        """B as one matrix for all outputs, (out, parts r): B_p in the rows of part p and the columns of A_p, zero
        elsewhere. With it, the dense update of the layer is s full_B A."""
        rank, parts = self.lora_B.shape[1], len(self.offsets)
        full = self.lora_B.new_zeros(self.out_features, parts * rank)
        for p, B in enumerate(self.lora_B.chunk(parts)):
            rows = slice(self.offsets[p], self.offsets[p] + self.part_size)
            columns = slice(p * rank, (p + 1) * rank)
            full[rows, columns] = B
        return full

    def update(self) -> Tensor:
        """The dense update s B A in fp32, (out, in). For merging: training never computes it."""
        return self.scale * (self.full_B().float() @ self.lora_A.float())


def apply(model: GPT, options: Options) -> None:
    """Replace the target layers by LoRALinear. Raises UserError for unknown targets or patterns."""
    for target in target_layers(model, options):
        layer = LoRALinear(target.layer, target.rank, target.scale, options.dropout, target.offsets, target.part_size)
        replace_layer(model, target, layer)


@dataclass(frozen=True)
class Target:
    """A layer to update, and the shape and scale of its update."""

    name: str  # such as h.0.attn.c_attn
    layer: Linear
    rank: int
    scale: float
    offsets: tuple[int, ...]
    part_size: int


def target_layers(model: GPT, options: Options) -> list[Target]:
    """The layers that get an update, in the order of the blocks. Raises UserError for unknown targets or patterns."""
    targets = parse_targets(options.targets)
    C = model.config.n_embd
    qkv_offsets = tuple(i * C for i, part in enumerate("qkv") if part in targets)  # empty without q, k and v
    names = []
    for i in range(len(model.h)):
        for module, target in TARGET_MODULES.items():
            if target in targets or (module == "attn.c_attn" and qkv_offsets):
                names.append(f"h.{i}.{module}")
    ranks = per_layer("rank_pattern", options.rank_pattern, options.rank, names)
    alphas = per_layer("alpha_pattern", options.alpha_pattern, options.alpha, names)
    found = []
    for name in names:
        layer, rank = model.get_submodule(name), ranks[name]
        if rank == 0:
            continue
        # alpha / rank: the learning rate need not change with the rank (Hu et al. 2021, section 4.1). At high ranks it
        # makes the update too small, so rslora divides by less.
        scale = alphas[name] / (math.sqrt(rank) if options.scaling == "rslora" else rank)
        offsets, part_size = (0,), layer.out_features  # all outputs as one part
        if qkv_offsets and name.endswith("c_attn"):
            offsets, part_size = qkv_offsets, C
        found.append(Target(name, layer, rank, scale, offsets, part_size))
    return found


def replace_layer(model: GPT, target: Target, layer: Linear) -> None:
    """Put `layer` in the place of the target's layer."""
    parent, _, attribute = target.name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def parse_targets(text: str) -> set[str]:
    """A comma list of targets and groups of targets. Raises UserError."""
    names = []
    for word in text.split(","):
        targets = TARGET_GROUPS.get(word.strip(), word.strip())  # a target that is no group stays as it is
        names += targets.split(",")
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise UserError(f"--targets {text}: {', '.join(map(repr, unknown))} is not a target; there are "
                        f"{', '.join((*TARGETS, *TARGET_GROUPS))}")
    if "qkv" in names and {"q", "k", "v"} & set(names):
        # both would be updates of the same outputs
        raise UserError(f"--targets {text}: qkv is one update of the whole fused matrix, q, k and v are "
                        "updates of its parts: choose one")
    return set(names)


def per_layer(field: str, pattern: str | None, default: float, names: list[str]) -> dict[str, float]:
    """A value for each layer in `names`: of the last entry in `pattern` that matches it, else the default. `field` is
    "rank_pattern" or "alpha_pattern". Raises UserError."""
    values = dict.fromkeys(names, default)
    parse = parse_int if field == "rank_pattern" else parse_float
    for word in pattern.split(",") if pattern else ():
        part, _, text = word.strip().partition("=")
        # with dots around them, so that h.1 does not match h.11
        matched = [name for name in names if f".{part}." in f".{name}."]
        try:
            value = parse(text)
        except ValueError:
            value = None
        if not matched or value is None or value < 0 or (value == 0 and field == "alpha_pattern"):
            raise UserError(f"{field} {word.strip()!r:.80}: must be parts of an updated layer's name and its "
                            f"value, such as c_attn=4 or h.0=4; there is {', '.join(names[:4])}, ...")
        values |= dict.fromkeys(matched, value)
    return values


def lora_layers(model: GPT) -> dict[str, LoRALinear]:
    """Every updated layer by its name, such as h.0.attn.c_attn."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add every update to its weight: the model computes the same function, without the extra work of the updates."""
    for layer in lora_layers(model).values():
        if layer.unmerged_weight is None:
            layer.unmerged_weight = layer.weight.data
            merged = layer.weight.float() + layer.update()  # in fp32, so that bf16 weights are rounded once
            layer.weight.data = merged.to(layer.weight.dtype)


def unmerge(model: GPT) -> None:
    """Undo `merge`, bit for bit. The base's weights were kept: a subtraction would not restore them exactly."""
    for layer in lora_layers(model).values():
        if layer.unmerged_weight is not None:
            layer.weight.data, layer.unmerged_weight = layer.unmerged_weight, None


MODE = Mode("lora", Options, apply, lr=3e-3, embedded_lr=7e-3, merge=merge, peft_type="LORA", uses_kernel=True)
