"""LoRA (Hu et al. 2021): W stays frozen, and a low-rank update s B A beside it trains.

A starts with Kaiming's uniform distribution and B at zero, so the first step starts from the base exactly.
The arithmetic is `lora_linear` in minift/kernels.py; this file says where it goes, what PEFT calls it, and
how one batch uses several files.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minift.errors import UserError
from minift.model.gpt import GPT, Linear
from minift.ops.lora import lora_linear
from minift.options import finite, option, whole

peft_type = "LORA"
TRAINING = {"lr": 1e-3, "weight_decay": 0.0}
GROUPS = {"all": "q,k,v,o,fc,proj", "attention": "q,k,v,o", "mlp": "fc,proj"}
TARGETS = ("q", "k", "v", "qkv", "o", "fc", "proj")
PLACES = {"attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "fc", "mlp.c_proj": "proj"}  # of a block


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
    rank_pattern: str | None = option(None, "other ranks by parts of a layer's name, the last match counts: "
                                            "c_attn=4,h.0.mlp=0; 0 leaves a layer out")
    alpha_pattern: str | None = option(None, "other alphas, likewise")


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

    def whole_B(self) -> Tensor:
        """B of the same update as one of all outputs, whose A is `lora_A`: (out, parts * rank), each part a
        block of its own, zero in the rows that no part covers."""
        whole, rank = self.lora_B.new_zeros(self.out_features, len(self.lora_A)), self.lora_B.shape[1]
        for i, (start, B) in enumerate(zip(self.offsets, self.lora_B.chunk(len(self.offsets)), strict=True)):
            whole[start : start + self.part, i * rank : (i + 1) * rank] = B
        return whole

    def update(self) -> Tensor:
        """The dense update s B A in fp32, (out, in)."""
        return self.scale * (self.whole_B().float() @ self.lora_A.float())


def apply(model: GPT, options: Options) -> None:
    """Replace the target layers by LoRALinear. Raises UserError for a target or a value that cannot be
    honoured."""
    if options.rank < 1 or not options.alpha > 0 or not 0 <= options.dropout < 1:
        raise UserError(f"--rank {options.rank} --alpha {options.alpha} --dropout {options.dropout}: rank "
                        "must be at least 1, alpha above 0, dropout at least 0 and below 1")
    targets, C = parse_targets(options.targets), model.config.n_embd
    parts = tuple(i * C for i, target in enumerate("qkv") if target in targets)  # of c_attn
    names = [f"h.{i}.{place}" for i in range(len(model.h)) for place, target in PLACES.items()
             if target in targets or (parts and place == "attn.c_attn")]
    ranks = spread("--rank-pattern", options.rank_pattern, options.rank, names)
    alphas = spread("--alpha-pattern", options.alpha_pattern, options.alpha, names)
    for name in filter(ranks.get, names):
        base, rank = model.get_submodule(name), ranks[name]
        scale = alphas[name] / (math.sqrt(rank) if options.scaling == "rslora" else rank)
        offsets, part = (parts, C) if parts and name.endswith("c_attn") else ((0,), base.out_features)
        owner, _, slot = name.rpartition(".")
        layer = LoRALinear(base, rank, scale, options.dropout, offsets, part)
        setattr(model.get_submodule(owner), slot, layer)
    for layer in lora_layers(model).values():
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


def spread(flag: str, pattern: str | None, default: float, names: list[str]) -> dict[str, float]:
    """A value for each layer: `pattern`'s, as far as it says one, else the default. Raises UserError."""
    values = dict.fromkeys(names, default)
    for word in pattern.split(",") if pattern else ():
        part, _, text = word.strip().partition("=")
        matched = [name for name in names if f".{part}." in f".{name}."]  # whole parts: h.1 is not h.11
        try:
            value = whole(text) if flag == "--rank-pattern" else finite(text)
        except ValueError:
            value = -1
        if not matched or value < 0 or (value == 0 and flag == "--alpha-pattern"):
            raise UserError(f"{flag} {word.strip()!r:.80}: must be parts of an adapted layer's name and its "
                            f"value, such as c_attn=4 or h.0=4; there is {', '.join(names[:4])}, ...")
        values |= dict.fromkeys(matched, value)
    return values


def lora_layers(model: GPT) -> dict[str, LoRALinear]:
    """Every adapted layer by its name, such as h.0.attn.c_attn."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold every update into its weight: the same function without the extra work. The sum is made in
    fp32."""
    for layer in lora_layers(model).values():
        if layer.unmerged is None:
            layer.unmerged = layer.weight.data
            layer.weight.data = (layer.weight.float() + layer.update()).to(layer.weight.dtype)


def unmerge(model: GPT) -> None:
    """Undo `merge`. The base's weights were kept, so they come back bit for bit (subtracting would not do
    that)."""
    for layer in lora_layers(model).values():
        if layer.unmerged is not None:
            layer.weight.data, layer.unmerged = layer.unmerged, None


class MixedLinear(Linear):
    """A linear layer in which each row of a batch uses its own of F updates, or none (-1).

    A: (F, R, in), B: (F, R, out) with the scale in it; R is the largest rank, and the rest zero. `files` (B,)
    says which a row uses, and `own` (N, F) which each token of the pass that has begun.
    """

    def __init__(self, base: Linear, layers: list[LoRALinear | None]):
        super().__init__(base.in_features, base.out_features, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.files = torch.tensor([-1])
        ranks = [0 if layer is None else len(layer.lora_A) for layer in layers]
        self.A = base.weight.new_zeros(len(layers), max(ranks), base.in_features)
        self.B = base.weight.new_zeros(len(layers), max(ranks), base.out_features)
        for i, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
            if layer is not None:
                self.A[i, :rank] = layer.lora_A
                self.B[i, :rank] = layer.scale * layer.whole_B().T

    def begin(self, count: int, token_rows: Tensor) -> None:
        """A pass of `count` rows begins; token_rows (N,) says which of them a token belongs to."""
        if count != len(self.files):
            raise UserError(f"a batch of {count} rows, and `choose` named the files of {len(self.files)}")
        self.own = self.files[token_rows][:, None] == torch.arange(len(self.A), device=token_rows.device)

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.A.flatten(0, 1)).unflatten(1, (len(self.A), -1))  # (N, F, R)
        own = (h * self.own[..., None]).flatten(1)
        return torch.addmm(super().forward(x), own, self.B.flatten(0, 1))  # (N, out)


@torch.no_grad()
def mix(base: GPT, models: Sequence[GPT]) -> GPT:
    """A model for batches whose rows use different LoRA files, as `choose` says. The
    base's products are those of one model, to which each row adds its own update. For inference alone.

    models: made from `base` by GPT.share, each with its LoRA. Raises UserError when one is tuned otherwise.
    """
    mixed, layers = base.share(), [lora_layers(model) for model in models]
    for model, own in zip(models, layers, strict=True):
        low_rank = {p for layer in own.values() for p in (layer.lora_A, layer.lora_B)}
        tuned = {p for p in model.parameters() if p.requires_grad}
        if model.fingerprint != base.fingerprint or tuned != low_rank:
            raise UserError("the rows of a batch can use different LoRA files of one base, and nothing else: "
                            "a soft prompt makes rows longer, other modes change more than a low-rank "
                            "update; use those one at a time")
    for name in dict.fromkeys(name for own in layers for name in own):
        owner, _, slot = name.rpartition(".")
        layer = MixedLinear(mixed.get_submodule(name), [own.get(name) for own in layers])
        setattr(mixed.get_submodule(owner), slot, layer)
        mixed.by_row.append(layer)
    return mixed


def choose(mixed: GPT, rows: Sequence[int]) -> None:
    """From now on row i of a batch uses the update of `mix`'s models[rows[i]]; -1 is the base itself."""
    for layer in mixed.modules():
        if isinstance(layer, MixedLinear):
            files = len(layer.A)
            if not all(-1 <= row < files for row in rows):
                raise UserError(f"rows {list(rows)}: there are {files} files, from 0 on, and -1, the base")
            layer.files = torch.tensor(rows, device=layer.A.device)
