"""Selective tuning: some parameters of the base train, the others stay frozen.

FT-Top2 of the LoRA paper (Hu et al. 2021, table 3) is `top:2`; BitFit (Ben Zaken et al. 2022) is `bias`.
Parameters are found by the type and place of their module, never by a part of their name, which would be fragile.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from minift.errors import UserError
from minift.model.gpt import GPT
from minift.modes.mode import Mode
from minift.options import option

GROUP_HELP = "top:N, bottom:N, blocks:A-B, bias, norm, attention, mlp, embeddings, final"


@dataclass(frozen=True)
class Options:
    # "," is a union of terms, "+" an intersection of groups within a term
    train: str = option("top:2", f"the parameters that train: a comma list (a union) of {GROUP_HELP}; '+' "
                                 "intersects: top:2+bias is the biases of the top two blocks")


def apply(model: GPT, options: Options) -> None:
    """Unfreeze the parameters that `options.train` names. Raises UserError for an unknown group, or a term that matches
    no parameter."""
    for term in options.train.split(","):
        chosen = list(model.parameters())
        for group in term.split("+"):
            members = set(group_parameters(model, group.strip()))  # tensors hash by identity
            chosen = [parameter for parameter in chosen if parameter in members]
        if not chosen:
            raise UserError(f"--train {options.train}: {term.strip()!r} matches no parameter of this model "
                            f"({model.config.n_layer} blocks); there are {GROUP_HELP}")
        for parameter in chosen:
            parameter.requires_grad_(True)


def group_parameters(model: GPT, group: str) -> Iterable[nn.Parameter]:
    """The parameters of one group, such as `top:2` or `bias`."""
    kind, _, argument = group.partition(":")
    if kind in ("top", "bottom", "blocks") and argument:
        return model.h[block_range(kind, argument, len(model.h))].parameters()
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    biases = [module.bias for module in norms + linears if module.bias is not None]
    groups = {
        "bias": [nn.ParameterList(biases)],
        "norm": norms,
        "attention": [block.attn for block in model.h],
        "mlp": [block.mlp for block in model.h],
        "embeddings": [model.wte, model.wpe],
        "final": [model.ln_f],
    }
    if group not in groups:
        raise UserError(f"--train: {group!r} is not a group of parameters; there are {GROUP_HELP}")
    return (parameter for module in groups[group] for parameter in module.parameters())


def block_range(kind: str, argument: str, n_layer: int) -> slice:
    """The blocks that `top:2`, `bottom:1` or `blocks:4-7` names, as a slice. Blocks are counted from 0, and both ends
    are included."""
    first, dash, last = argument.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and kind != "blocks"):
        raise UserError(f"--train: {kind}:{argument} cannot be read; write top:2, bottom:1 or blocks:4-7")
    count = int(first)
    if kind == "top":
        begin, end = n_layer - count, n_layer
    elif kind == "bottom":
        begin, end = 0, count
    else:
        begin, end = count, int(last or first) + 1  # blocks:4 is block 4 alone
    if begin < 0 or end > n_layer or begin >= end:
        raise UserError(f"--train: {kind}:{argument} does not fit a model of {n_layer} blocks (0 to "
                        f"{n_layer - 1})")
    return slice(begin, end)


MODE = Mode("selective", Options, apply, lr=3e-3, embedded_lr=3e-3, weight_decay=0.01)
