"""Operators of our own, as torch knows them."""

from collections.abc import Callable
from typing import Any

import torch

FLOPS: dict[Any, Callable[..., int]] = {}  # of our own operators, from their arguments


def operator(name: str, implementation: Callable[..., Any], fake: Callable[..., Any],
             flops: Callable[..., int] = lambda *_: 0) -> Any:
    """`implementation` as torch.ops.minift.NAME, which on fake tensors (the plan's) gives what `fake` gives.
    Not by torch.library.custom_op, whose first call imports torch's compiler: 2 s and 150 MB."""
    torch.library.define(f"minift::{name}", torch.library.infer_schema(implementation, mutates_args=()))
    torch.library.impl(f"minift::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"minift::{name}", fake)
    op = getattr(torch.ops.minift, name)
    FLOPS[op] = flops
    return op
