"""Functions of tensors. Each file has a plain reference of at most ten lines, then a faster version of it.

`train.py --ops plain` sets `plain`, and the program runs on the references. Use it to step through the
computation, or to find out whether a bug is in a fast version. Losses agree up to rounding.
"""

from collections.abc import Callable
from typing import Any

import torch

plain: bool = False

# The FLOPs of each operator of our own, as a function of its arguments. plan.py counts with it.
FLOPS: dict[Any, Callable[..., int]] = {}


def no_flops(*args: Any) -> int:
    """For an operator without matrix products: only these are counted."""
    return 0


def register_op(name: str, implementation: Callable[..., Any], fake: Callable[..., Any],
                flops: Callable[..., int] = no_flops) -> Any:
    """Make `implementation` known to torch as torch.ops.minift.NAME, and return that operator.

    fake: gives empty tensors of the result's shapes. torch calls it on fake tensors, as the plan does.
    """
    # torch.library.custom_op would do the same, but its first call imports torch's compiler: 2 s and 150 MB.
    schema = torch.library.infer_schema(implementation, mutates_args=())
    torch.library.define(f"minift::{name}", schema)
    torch.library.impl(f"minift::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"minift::{name}", fake)
    op = getattr(torch.ops.minift, name)
    FLOPS[op] = flops
    return op
