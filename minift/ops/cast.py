"""Trained parameters in the compute dtype. They are stored in fp32, and each use needs a copy.

On a GPU a copy of a small matrix costs the host more time than the device, so `cast_together` makes those of all layers
with a few kernels, and `cast` finds them.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter in `dtype`: the copy that `cast_together` made, else as .to(dtype). Autograd does not see the copy,
    so only an autograd Function calls this, which gives the gradient to the parameter itself."""
    copy = getattr(parameter, "cast_copy", None)
    if copy is not None and copy.dtype == dtype:
        return copy
    return parameter.to(dtype)


@contextlib.contextmanager
def cast_together(parameters: list[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """While entered, every parameter has a copy in `dtype` for `cast`. The parameters must not change meanwhile."""
    copies = [torch.empty_like(parameter, dtype=dtype) for parameter in parameters]
    with torch.no_grad():
        torch._foreach_copy_(copies, parameters)
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.cast_copy = copy
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter.cast_copy
