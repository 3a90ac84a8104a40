"""Selective tuning, the layer-freezing selector: some of the base's own parameters train, the others stay
frozen.

FT-Top2 of the LoRA paper (Hu et al. 2021, table 3) is `top:2`; BitFit (Ben Zaken et al. 2022) is `bias`.
Parameters are found by the module that owns them, never by a piece of their name.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from minift.errors import UserError
from minift.model.gpt import GPT
from minift.options import option

peft_type = None
TRAINING = {"lr": 3e-4, "weight_decay": 0.01}
GROUPS = "top:N, bottom:N, blocks:A-B, bias, norm, attention, mlp, embeddings, final"


@dataclass(frozen=True)
class Options:
    train: str = option("top:2", f"what trains: a comma list (a union) of {GROUPS}; '+' intersects: "
                                 "top:2+bias is the biases of the top two blocks")


def apply(model: GPT, options: Options) -> None:
    """Unfreeze what `options.train` names. Raises UserError for an unknown group or one that matches
    nothing."""
    for term in options.train.split(","):
        chosen = {p: True for p in model.parameters()}  # a dict keeps the order, and tensors hash by identity
        for group in term.split("+"):
            members = set(group_parameters(model, group.strip()))
            chosen = {p: True for p in chosen if p in members}
        if not chosen:
            raise UserError(f"--train {options.train}: {term.strip()!r} matches no parameter of this model "
                            f"({model.config.n_layer} blocks); there are {GROUPS}")
        for parameter in chosen:
            parameter.requires_grad_(True)


def group_parameters(model: GPT, group: str) -> Iterable[nn.Parameter]:
    """The parameters of one group, such as `top:2` or `bias`."""
    kind, _, argument = group.partition(":")
    if kind in ("top", "bottom", "blocks") and argument:
        return model.h[block_range(kind, argument, len(model.h))].parameters()
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    groups = {
        "bias": [nn.ParameterList(m.bias for m in norms + linears if m.bias is not None)],
        "norm": norms,
        "attention": [block.attn for block in model.h],
        "mlp": [block.mlp for block in model.h],
        "embeddings": [model.wte, model.wpe],
        "final": [model.ln_f],
    }
    if group not in groups:
        raise UserError(f"--train: {group!r} is not a group of parameters; there are {GROUPS}")
    return (p for module in groups[group] for p in module.parameters())


def block_range(kind: str, argument: str, n_layer: int) -> slice:
    """`top:2`, `bottom:1` or `blocks:4-7` (both ends included, counted from 0) as a slice of the blocks."""
    first, dash, last = argument.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and kind != "blocks"):
        raise UserError(f"--train: {kind}:{argument} is not understood; write top:2, bottom:1 or blocks:4-7")
    if kind == "blocks":
        begin, end = int(first), int(last or first) + 1
    else:
        count = int(first)
        begin, end = (n_layer - count, n_layer) if kind == "top" else (0, count)
    if begin < 0 or end > n_layer or begin >= end:
        raise UserError(f"--train: {kind}:{argument} does not fit a model of {n_layer} blocks (0 to "
                        f"{n_layer - 1})")
    return slice(begin, end)
