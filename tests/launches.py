"""The kernels that a training step launches on a GPU, counted without one.

The step runs on meta tensors, which have shapes but no values. Our code takes its branches for a GPU there, as these
tensors are on no CPU. A step with few tokens waits for the host, which needs some microseconds for each launch.

The count is an upper bound, by these rules:
- A view, an empty tensor and a reshape without a copy launch nothing. Any other operation of torch is one kernel, where
  KERNELS says nothing else; an operation in no table is an error. A copy from or to the host counts like a kernel.
- Operations on lists (AdamW, the clipping) launch one kernel for some tensors, see `list_kernels`.
- The operators of lora_triton.py and norm_triton.py run, with a counter in the place of Triton's launcher.
- AdamW's first step, which creates its state, is not counted.

PYTHONPATH=. python tests/launches.py prints the counts of all modes, and those of each operation with --operations.
"""

import contextlib
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import modes, training
from minift.files.hub import PRESETS
from minift.model import gpt
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row
from minift.ops.attention import PackedRows
from minift.training import apply_step, make_optimizer, train_step

aten = torch.ops.aten
NO_KERNEL = {"detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh",
             "_unsafe_view", "resize_"}
ONE_KERNEL = {
    "_to_copy", "copy_", "clone", "_local_scalar_dense", "fill_", "zero_", "zeros", "ones", "full", "zeros_like",
    "ones_like", "new_zeros", "new_full", "arange", "constant_pad_nd", "scalar_tensor", "full_like",
    "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "reciprocal", "exp", "exp_", "expm1",
    "log", "abs", "clamp", "clamp_", "where", "lt", "gt", "eq", "ne", "bitwise_not", "masked_fill", "masked_fill_",
    "threshold_backward", "all", "sum", "amax", "linalg_vector_norm", "_log_softmax", "_log_softmax_backward_data",
    "gather", "scatter_", "mm", "bmm", "addmm_", "gelu", "gelu_backward", "native_layer_norm",
    "index", "index_put", "index_put_", "index_select", "index_add", "index_add_", "index_copy", "embedding",
}


def list_kernels(depth: int, tensors: list[Tensor]) -> int:
    """The kernels of an operation on `depth` lists of tensors: each takes at most some tensors and 320 chunks of 65,536
    numbers, the limits for kernel arguments of 4 KB (torch 2.13, aten/src/ATen/native/cuda/MultiTensorApply.cuh)."""
    most_tensors = {1: 110, 2: 64, 3: 48, 4: 36}[depth]
    chunks = sum(math.ceil(tensor.numel() / 65536) for tensor in tensors)
    return math.ceil(len(tensors) / most_tensors) + math.ceil(chunks / 320)


def addmm_kernels(bias: Tensor, *_: Any) -> int:
    return 1 if bias.dim() == 1 else 2  # a matrix is first copied into the result


def norm_backward_kernels(dy: Tensor, x: Tensor, shape: Any, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor,
                          mask: list[bool]) -> int:
    return mask[0] + 2 * (mask[1] or mask[2])  # weight and bias share a kernel for parts and one for their sum


def embedding_backward_kernels(dy: Tensor, indices: Tensor, *_: Any) -> int:
    return 2 if indices.numel() <= 3072 else 10  # zeros and one kernel; with more tokens they are sorted first


KERNELS: dict[str, Callable[..., int]] = {
    "addmm": addmm_kernels,
    "native_layer_norm_backward": norm_backward_kernels,
    "embedding_dense_backward": embedding_backward_kernels,
    "cat": lambda tensors, *_: math.ceil(len(tensors) / 128),
    "stack": lambda tensors, *_: math.ceil(len(tensors) / 128),
    "nll_loss_forward": lambda *_: 1,
    "nll_loss_backward": lambda *_: 2,  # zeros, then one number of each row
    "_foreach_norm": lambda tensors, *_: 2 + list_kernels(1, tensors),  # zeros before, and the sum of parts after
    "_foreach_mul_": lambda tensors, *_: list_kernels(1, tensors),
    "_foreach_add_": lambda tensors, *_: list_kernels(1, tensors),
    "_foreach_sub_": lambda tensors, *_: list_kernels(2, tensors),
    "_foreach_copy_": lambda tensors, *_: list_kernels(2, tensors),
    "_fused_adamw_": lambda parameters, *_: list_kernels(4, parameters),
    "_flash_attention_forward": lambda *_: 1,
    "_flash_attention_backward": lambda *_: 3,  # the sums of dy y, the gradients, and a cast of dq
    "drop": lambda tensors, *_: 1 + len(tensors),  # the mask, and one product for each tensor
    "keep_mask": lambda *_: 1,
}


class LaunchCounter(TorchDispatchMode):
    """While entered: the kernels of every operation, by its name. Operations that need values get invented ones."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "minift" and name in ("lora_forward", "lora_backward", "add_norm", "add_norm_backward"):
            return self.run_triton(name, args)
        if func is aten._local_scalar_dense.default:
            result = 1
        elif name == "_fused_adamw_":
            result = None
        else:
            result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        on_gpu = any(tensor.device.type == "meta" for tensor in tensors)  # a sum of numbers on the host is no kernel
        if name in NO_KERNEL or func.is_view or not on_gpu:
            return result
        if name in KERNELS:
            self.kernels[name] += KERNELS[name](*args)
        elif name in ONE_KERNEL:
            self.kernels[name] += 1
        else:
            raise NotImplementedError(f"{func}: how many kernels does it launch?")
        return result

    def run_triton(self, name: str, args: Any) -> Any:
        """An operator of lora_triton.py or norm_triton.py, with its launches counted and not run."""
        from triton.runtime.jit import KernelInterface

        from minift.ops import lora_triton, norm_triton

        def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
            def count(*args: Any, **kwargs: Any) -> None:
                self.kernels[kernel.fn.__name__] += 1

            return count

        implementations = {"lora_forward": lora_triton.forward, "lora_backward": lora_triton.backward,
                           "add_norm": norm_triton.forward, "add_norm_backward": norm_triton.backward}
        with self, mock.patch.object(KernelInterface, "__getitem__", launcher):
            return implementations[name](*args)


def flash_attention(qkv: Tensor, rows: PackedRows, n_head: int, scale: float, dropout: float) -> Tensor:
    """In the place of attention: torch's flash attention on packed rows, (N, 3C) -> (N, C)."""
    q, k, v = qkv.unflatten(1, (3, n_head, -1)).unbind(1)  # each (N, nh, hs)
    longest = rows.max_cu_seqlen
    y, *_ = aten._flash_attention_forward(q, k, v, rows.cu_seqlens, rows.cu_seqlens, longest, longest, dropout, True,
                                          False, scale=scale)
    return y.flatten(1)


@contextlib.contextmanager
def like_a_gpu() -> Iterator[None]:
    """While entered: torch takes meta tensors for those of a GPU where it asks for the type of the device."""
    with contextlib.ExitStack() as stack:
        for module, function in (("torch.utils._foreach_utils", "_get_foreach_kernels_supported_devices"),
                                 ("torch.optim.optimizer", "_get_fused_kernels_supported_devices")):
            stack.enter_context(mock.patch(f"{module}.{function}", lambda: ["meta"]))
        yield


def count_launches(mode: str, n_layer: int = 12, kernel: str = "torch", rows: int = 8,
                   tokens: int = 170, **options: Any) -> Counter[str]:
    """The kernels of one step of GPT-2 124M (or of fewer blocks) in bf16: loss, backward pass, clipping and AdamW.
    `options` are the mode's."""
    config = PRESETS["gpt2"].config
    config = GPTConfig(**vars(config) | {"n_layer": n_layer})
    with torch.device("meta"):
        model = GPT(config)
    modes.apply(model, mode, modes.MODES[mode].Options(**options))
    model.set_compute_dtype(torch.bfloat16)
    model.set_kernel(kernel)
    model.train()
    targets = tokens // 6
    batch = [Row([0] * (tokens + 1), ((tokens + 1 - targets, tokens + 1),))] * rows  # the last token is only a target
    counter = LaunchCounter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(like_a_gpu())
        stack.enter_context(mock.patch.object(gpt, "attention", flash_attention))
        stack.enter_context(mock.patch.object(training, "reads_late", lambda device: True))
        optimizer = make_optimizer(model, 1e-3, 0.01)
        for parameter in modes.tuned_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        with counter:
            optimizer.step()  # creates its state
            optimizer.zero_grad(set_to_none=True)
            counter.kernels.clear()
            apply_step(optimizer, train_step(model, [batch], 1.0))
    return counter.kernels


STEPS = {
    "LoRA, Function": dict(mode="lora"),
    "LoRA, Triton": dict(mode="lora", kernel="triton"),
    "full": dict(mode="full"),
    "selective": dict(mode="selective"),
    "prompt": dict(mode="prompt"),
    "adapter": dict(mode="adapter"),
}

if __name__ == "__main__":
    for title, step in STEPS.items():
        kernels = count_launches(**step)
        print(f"{title:15} {kernels.total():5}")
        if "--operations" in sys.argv:
            print("  ", ", ".join(f"{name} {count}" for name, count in kernels.most_common()))
