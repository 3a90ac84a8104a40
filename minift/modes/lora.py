"""LoRA (Hu et al. 2021): W stays frozen, and a low-rank update s B A beside it trains.

A starts with Kaiming's uniform distribution and B at zero, so the first step starts from the base exactly.
The arithmetic is `lora_linear` in minift/kernels.py; this file says where it goes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import lora_linear
from ..model import GPT, Linear
from ..options import option

TRAINING = {"lr": 1e-3, "weight_decay": 0.0}
GROUPS = {"all": "q,k,v,o,fc,proj", "attention": "q,k,v,o", "mlp": "fc,proj"}
TARGETS = ("q", "k", "v", "qkv", "o", "fc", "proj")


@dataclass(frozen=True)
class Options:
    rank: int = option(8, "rank r of the update: beside a 512 x 64 matrix of 32,768 weights, r = 8 trains "
                          "4,608, 86 % fewer")
    alpha: float = option(16.0, "the update is scaled by alpha / rank, or as --scaling says")
    dropout: float = option(0.0, "dropout on the update's input")
    targets: str = option("all", "matrices that get an update, a comma list of q, k, v, o (attention's "
                                 "projection), fc, proj (the MLP's two), qkv (the fused matrix as one), all, "
                                 "attention, mlp")
    scaling: str = option("standard", "standard: alpha/rank; rslora: alpha/sqrt(rank) (Kalajdzievski 2023)",
                          ("standard", "rslora"))


class LoRALinear(Linear):
    """A linear layer with a low-rank update on some of its outputs. It takes over the base's weight and bias
    under their own names. `offsets` says where each adapted part of `part` outputs begins: for q and v of
    c_attn, 0 and 2C.

    lora_A: (parts * rank, in), lora_B: (parts * part, rank).
    """

    kernel = "auto"  # how `lora_linear` computes; GPT.set_kernel changes it

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float, offsets: tuple[int, ...],
                 part: int):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(len(offsets) * rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(len(offsets) * part, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as loralib: uniform within 1/sqrt(in)
        self.scale, self.dropout, self.offsets, self.part = scale, dropout, offsets, part
        self.unmerged: Tensor | None = None  # the base's own weight, while the update is merged into `weight`

    def forward(self, x: Tensor) -> Tensor:
        if self.unmerged is not None:
            return super().forward(x)
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, self.offsets,
                           self.dropout if self.training else 0.0, self.kernel)

    def update(self) -> Tensor:
        """The dense update s B A in fp32, (out, in): zero in the rows that no part covers."""
        dense = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        parts = len(self.offsets)
        for start, A, B in zip(self.offsets, self.lora_A.chunk(parts), self.lora_B.chunk(parts), strict=True):
            dense[start : start + self.part] = self.scale * (B.float() @ A.float())
        return dense


def apply(model: GPT, options: Options) -> None:
    """Replace the target layers by LoRALinear. Raises UserError for a target or a value that cannot be
    honoured."""
    if options.rank < 1 or not options.alpha > 0 or not 0 <= options.dropout < 1:
        raise UserError(f"--rank {options.rank} --alpha {options.alpha} --dropout {options.dropout}: rank "
                        "must be at least 1, alpha above 0, dropout at least 0 and below 1")
    scale = options.alpha / (math.sqrt(options.rank) if options.scaling == "rslora" else options.rank)
    targets, C = parse_targets(options.targets), model.config.n_embd
    places = {"o": ("attn", "c_proj"), "fc": ("mlp", "c_fc"), "proj": ("mlp", "c_proj")}

    def inject(owner: nn.Module, name: str, offsets: tuple[int, ...], part: int) -> None:
        layer = LoRALinear(getattr(owner, name), options.rank, scale, options.dropout, offsets, part)
        setattr(owner, name, layer)

    for block in model.h:
        fused = tuple(i * C for i, target in enumerate("qkv") if target in targets)
        if "qkv" in targets:
            inject(block.attn, "c_attn", (0,), 3 * C)
        elif fused:
            inject(block.attn, "c_attn", fused, C)
        for target, (owner, name) in places.items():
            if target in targets:
                module = getattr(block, owner)
                inject(module, name, (0,), getattr(module, name).out_features)
    for layer in lora_layers(model):
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)


def parse_targets(text: str) -> set[str]:
    names = [name.strip() for word in text.split(",") for name in GROUPS.get(word.strip(), word).split(",")]
    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise UserError(f"--targets {text}: {', '.join(map(repr, unknown))} is not a target; there are "
                        f"{', '.join((*TARGETS, *GROUPS))}")
    if "qkv" in names and {"q", "k", "v"} & set(names):
        raise UserError(f"--targets {text}: qkv is one update of the whole fused matrix, q, k and v are "
                        "updates of its parts: choose one")
    return set(names)


def lora_layers(model: GPT) -> list[LoRALinear]:
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold every update into its weight: the same function without the extra work. The sum is made in
    fp32."""
    for layer in lora_layers(model):
        if layer.unmerged is None:
            layer.unmerged = layer.weight.data
            layer.weight.data = (layer.weight.float() + layer.update()).to(layer.weight.dtype)


def unmerge(model: GPT) -> None:
    """Undo `merge`. The base's weights were kept, so they come back bit for bit (subtracting would not do
    that)."""
    for layer in lora_layers(model):
        if layer.unmerged is not None:
            layer.weight.data, layer.unmerged = layer.unmerged, None
