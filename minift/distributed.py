"""More than one process: torchrun starts them, torch's DistributedDataParallel or FSDP2 joins their work.

Every process, a rank, runs the same steps on its own rows of each batch, so a run's losses do not depend on the
number of processes. Rank 0 alone prints and writes. With one process every function here does the plain thing, and
torch.distributed is not imported.
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

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1  # torchrun sets both
RANK = int(os.environ["RANK"]) if WORLD_SIZE > 1 else 0
LOCAL_RANK = int(os.environ["LOCAL_RANK"]) if WORLD_SIZE > 1 else 0  # on this machine


def is_main() -> bool:
    return RANK == 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other ranks; a script's main runs inside. Only rank 0 has a standard output, and only the first
    rank to fail prints its error: later errors are usually consequences."""
    if WORLD_SIZE == 1:
        yield
        return
    import torch.distributed as dist
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    store, _, _ = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    code = 0
    try:
        with explain_lost_rank("torchrun reports which"):
            yield
    except SystemExit as ended:
        barrier()  # the first process that ends gets the others killed: wait until all are done
        code = ended.code
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # rank 0 may have ended, and the store with it
            if store.add("failed ranks", 1) > 1:
                sys.stderr = open(os.devnull, "w")
        expected = isinstance(error, UserError) or out_of_memory(error)
        atexit.register(hard_exit, 130 if isinstance(error, KeyboardInterrupt) else 2 if expected else 1)
        raise  # run_script prints the error, then the interpreter begins to end
    hard_exit(code or 0)


def hard_exit(code: int) -> None:
    """End this process at once: gloo's threads now and then abort when the interpreter takes them down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def explain_lost_rank(remedy: str) -> Iterator[None]:
    """Turn what torch raises when another rank is gone into a UserError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if WORLD_SIZE == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"a process of this run is gone, and the others end with it; {remedy}") from error


def broadcast(make: Callable[[], Any]) -> Any:
    """The result of `make()` on rank 0, on every rank."""
    if WORLD_SIZE == 1:
        return make()
    found = [make() if is_main() else None]
    torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def all_sum(*values: float) -> list[float]:
    """The sums of numbers over all ranks: the same bits on every rank, so decisions from them agree."""
    if WORLD_SIZE == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def barrier() -> None:
    """Wait for all ranks."""
    all_sum(0)


def seed_step(seed: int, step: int) -> None:
    """Seed the random draws of a step (dropout): each rank and step its own, so a resumed run draws the same."""
    torch.manual_seed(random.Random(f"{seed} {step} {RANK}").getrandbits(32))  # a CPU uses no more bits


def local_rows(rows: list[Any]) -> list[Any]:
    """This rank's rows of a batch. If its share is empty, one row without targets, since every rank must join the
    collectives."""
    return rows[RANK::WORLD_SIZE] or [replace(rows[0], spans=())]


def to_device(model: nn.Module, device: torch.device, shard: bool) -> None:
    """Move a model to this rank's device: the whole model, or with `shard` a part of every parameter. A sharded
    block is gathered while it computes; the rest (embeddings, last norm, soft prompt) for a whole pass."""
    if WORLD_SIZE == 1 or not shard:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (WORLD_SIZE,))
    # gathered in the dtype that a block computes in, or autograd would keep a cast copy of the whole block
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    no_decay = {name for name, p in model.named_parameters() if getattr(p, "no_decay", False)}
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(block, "next")  # decoding does not call the block's forward
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # all passes go through it
    for name, parameter in model.named_parameters():  # FSDP2 makes new parameters, without their marks
        parameter.no_decay = name in no_decay


def reshard(model: nn.Module) -> None:
    """Free the full parameters that a pass without a backward pass leaves gathered."""
    if is_sharded(model):
        model.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor, whose class is not imported with one process


class Loss(nn.Module):
    """A model's loss in the form that DistributedDataParallel needs: a module that is called."""

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
        target.data = source.to(target, copy=True)  # new storage: a shared copy must not change its origin
        return
    kind = {"dtype": target.dtype, "device": target.device}
    full = source.to(**kind) if is_main() else torch.empty(target.shape, **kind)
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(full, src=0)
        target.copy_(full)
