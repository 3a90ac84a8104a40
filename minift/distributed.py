"""More than one process: torchrun starts them, and torch's DistributedDataParallel or FSDP2 joins their work.

Every process, a rank, walks through the same steps and takes its share of each batch's rows, so that a run's
losses do not depend on their number. Rank 0 alone prints and writes. In a process of its own every function
here is the plain thing, and torch.distributed is not even imported.
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

WORLD = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1  # torchrun sets both
RANK, LOCAL_RANK = (int(os.environ[name]) if WORLD > 1 else 0 for name in ("RANK", "LOCAL_RANK"))
FIRST = RANK == 0


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the other ranks; to be put around a script's main. Only rank 0 has a standard output, and only
    the rank that meets an error first tells it: what the others then see is mostly its consequence."""
    if WORLD == 1:
        yield
        return
    import torch.distributed as dist
    if not FIRST:
        sys.stdout = open(os.devnull, "w")
    store, _, _ = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    code = 0
    try:
        with guard("torchrun reports which"):
            yield
    except SystemExit as ended:
        code = ended.code
    except (Exception, KeyboardInterrupt) as error:
        with contextlib.suppress(RuntimeError):  # the store is gone too
            if store.add("told", 1) > 1:
                sys.stderr = open(os.devnull, "w")
        told = isinstance(error, UserError) or out_of_memory(error)
        atexit.register(leave, 130 if isinstance(error, KeyboardInterrupt) else 2 if told else 1)
        raise  # run_script says what happened, and the interpreter begins to end
    leave(code or 0)


def leave(code: int) -> None:
    """End this process at once: gloo's threads, taken down with the interpreter, now and then abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def guard(remedy: str) -> Iterator[None]:
    """What torch raises when another rank is gone becomes a UserError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if WORLD == 1 or not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"a process of this run is gone, and the others end with it; {remedy}") from error


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives on rank 0, on every rank."""
    if WORLD == 1:
        return make()
    found = [make() if FIRST else None]
    torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
    return found[0]


def total(*values: float) -> list[float]:
    """The sums of numbers over all ranks: the same bits on every rank, so all decide alike by them."""
    if WORLD == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def seed(seed: int, step: int) -> None:
    """Seed what a step draws (dropout): each rank and step its own, so that a resumed run draws the same."""
    torch.manual_seed(random.Random(f"{seed} {step} {RANK}").getrandbits(32))  # a CPU uses no more bits


def share(rows: list[Any]) -> list[Any]:
    """This rank's rows of a batch. Where there are none left it is one without targets: no loss and no
    gradient, but every rank has to take part in the passes."""
    return rows[RANK::WORLD] or [replace(rows[0], n_prompt=len(rows[0].ids))]


def place(model: nn.Module, device: torch.device, shard: bool) -> None:
    """Move a model to this rank's device: whole, or only its share of every parameter. A sharded block is
    gathered while it computes, the rest (embeddings, last norm, soft prompt) for a whole pass."""
    if WORLD == 1 or not shard:
        model.to(device)
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(device.type, (WORLD,))
    # gathered in what a block computes in anyway, or autograd would keep a cast copy of the whole block
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 takes no other
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")  # through which all passes go


def reshard(model: nn.Module) -> None:
    """Give back what a pass without a backward left gathered, so that `parameters` are the shards again."""
    if hasattr(model, "reshard"):
        model.reshard()


class Loss(nn.Module):
    """A model's loss as DistributedDataParallel wants it: a module that is called."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, lengths: list[int]) -> Tensor:
        return self.model.loss(ids, targets, lengths)


def replicate(model: nn.Module) -> nn.Module | None:
    """The model's loss under DistributedDataParallel, which averages the gradients over ranks; None where
    there is one process, or the model is sharded: FSDP2 does it then."""
    if WORLD == 1 or hasattr(model, "reshard"):
        return None
    return nn.parallel.DistributedDataParallel(Loss(model), gradient_as_bucket_view=True)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this rank may hold a shard; all ranks have to ask for it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy rank 0's whole `source` into every rank's `target`, which may be a shard; elsewhere `source` has
    no values."""
    if WORLD == 1:
        target.data = source.to(target, copy=True)  # new storage: see GPT.share
        return
    kind = {"dtype": target.dtype, "device": target.device}
    full = source.to(**kind) if FIRST else torch.empty(target.shape, **kind)
    if hasattr(target, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements))
    else:
        torch.distributed.broadcast(full, src=0)
        target.copy_(full)
