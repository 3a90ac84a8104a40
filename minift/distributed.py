"""Training in several processes: torchrun starts them, DistributedDataParallel or FSDP2 combines their gradients.

Every process (a rank) runs the same steps on its own rows of each batch. `--batch` counts the rows of all ranks, so a
run's losses do not depend on the number of processes. Rank 0 alone prints and writes. With one process every function
here does the simple thing, and torch.distributed is not imported: that takes long.
"""

import atexit
import contextlib
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minift.errors import UserError, out_of_memory

# torchrun sets all three; some cluster tools set WORLD_SIZE alone, so LOCAL_RANK decides
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if WORLD_SIZE > 1 else 0  # the rank on this machine


def is_main() -> bool:
    return RANK == 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other ranks; a script's main function runs inside. Only rank 0 has a standard output, and only the
    first rank to fail prints its error: later errors are usually consequences."""
    if WORLD_SIZE == 1:
        yield
        return
    import torch.distributed as dist
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    # the store is kept, to be asked after a failure; init_process_group alone would hide it
    store, _, _ = next(dist.rendezvous("env://"))
    # gloo for the tensors of numbers on the host that all_sum exchanges, on a machine with GPUs too
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    code = 0
    try:
        with explain_lost_rank("torchrun reports which"):
            yield
    except SystemExit as ended:
        barrier()  # when one process ends with an error, torchrun kills the others: wait until all are done
        code = ended.code
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # rank 0 may have ended, and the store with it
            if store.add("failed ranks", 1) > 1:  # add returns the sum: this rank is not the first
                sys.stderr = open(os.devnull, "w")
        if isinstance(error, KeyboardInterrupt):
            code = 130
        elif isinstance(error, UserError) or out_of_memory(error):
            code = 2
        else:
            code = 1
        # run_script, outside, prints the error; hard_exit runs when the interpreter begins to end
        atexit.register(hard_exit, code)
        raise
    hard_exit(code or 0)


def hard_exit(code: int) -> None:
    """End this process at once. In a normal end of the interpreter, gloo's threads sometimes abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def explain_lost_rank(remedy: str) -> Iterator[None]:
    """While entered: torch's error for a lost rank becomes a UserError that ends with `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if WORLD_SIZE == 1:
            raise
        # torch and NCCL raise a DistError; gloo raises a RuntimeError that names gloo
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise UserError(f"a process of this run is gone, and the others end with it; {remedy}") from error


def broadcast(make: Callable[[], Any]) -> Any:
    """The result of `make()` on rank 0, on every rank."""
    if WORLD_SIZE == 1:
        return make()
    holder = [make() if is_main() else None]  # torch fills a list in place
    torch.distributed.broadcast_object_list(holder, device=torch.device("cpu"))
    return holder[0]


def all_sum(*values: float) -> list[float]:
    """The sums of numbers over all ranks: the same bits on every rank, so decisions from them agree."""
    if WORLD_SIZE == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def barrier() -> None:
    """Wait for all ranks."""
    all_sum(0)  # a sum over all ranks ends when the last of them has joined


def seed_step(seed: int, step: int) -> None:
    """Seed the random draws of a step (dropout). The seed depends on the step, so a resumed run draws the same, and on
    the rank, so ranks drop different elements."""
    mixed = random.Random(f"{seed} {step} {RANK}").getrandbits(32)  # torch's generator on a CPU uses no more bits
    torch.manual_seed(mixed)


def local_rows(rows: list[Any]) -> list[Any]:
    """This rank's rows of a batch. If there are none, one row without targets: every rank must take part in the
    exchange of gradients."""
    return rows[RANK::WORLD_SIZE] or [replace(rows[0], spans=())]


def to_device(model: nn.Module, device: torch.device, shard: bool) -> None:
    """Move a model to this rank's device: all of it, or with `shard` a part of every parameter (FSDP2). The
    parameters of a sharded block are gathered while the block computes; the others (embeddings, last norm, soft
    prompt) during the full pass."""
    if WORLD_SIZE == 1 or not shard:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (WORLD_SIZE,))
    # gather in the compute dtype, or autograd would keep a cast copy of the block's parameters
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    no_decay = {name for name, p in model.named_parameters() if getattr(p, "no_decay", False)}
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 refuses others, such as weights transposed in a file
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "next")  # decoding does not call the block's forward
    fully_shard(model, mesh=mesh)  # the parameters that are in no block
    register_fsdp_forward_method(model, "hidden")  # training and scores call this method, not forward
    for name, parameter in model.named_parameters():  # FSDP2 makes new parameters, which have lost their marks
        parameter.no_decay = name in no_decay


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters. Needed after a forward pass without a backward pass, which would free them."""
    if is_sharded(model):
        model.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor; its class would have to be imported for isinstance


class Loss(nn.Module):
    """A model's loss as a module: DistributedDataParallel wraps modules, and exchanges gradients only after their
    forward method was called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Any) -> Tensor:
        return self.model.loss(batch)


def replicate(model: nn.Module) -> nn.Module | None:
    """The model's loss under DistributedDataParallel, which averages gradients over the ranks. None with one
    process, or for a sharded model, whose gradients FSDP2 averages."""
    if WORLD_SIZE == 1 or is_sharded(model):
        return None
    return nn.parallel.DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, of which this rank may hold a shard. All ranks must call it together."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


@torch.no_grad()
def copy_from_rank0(target: Tensor, source: Tensor) -> None:
    """Copy rank 0's full `source` into every rank's `target`, which may be a shard. On other ranks `source` has no
    values."""
    if WORLD_SIZE == 1:
        # new storage, not copy_: the target may share its storage with the base, which must not change
        target.data = source.to(target, copy=True)
        return
    kind = {"dtype": target.dtype, "device": target.device}
    full = source.to(**kind) if is_main() else torch.empty(target.shape, **kind)
    if is_shard(target):  # distribute_tensor sends rank 0's values to all ranks, each its part
        from torch.distributed.tensor import distribute_tensor
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(full, src=0)
        target.copy_(full)
