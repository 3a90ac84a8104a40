"""The cost of a run before it starts: python train.py --plan, without weights and without a network.

There are no formulas: the real training step of the real model in the real mode runs on torch's fake tensors, which
have a shape, a dtype and a device, but no memory. So the plan follows the code.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import modes
from minift.data.dataset import load_examples
from minift.device import choose_device, choose_dtype, process_bytes, resident_memory
from minift.distributed import local_rows
from minift.files import weights
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row
from minift.ops import FLOPS
from minift.report.table import format_bytes, table
from minift.run.config import Config
from minift.training import build_on_meta, largest_batch, make_optimizer, train_step

COLUMNS = {
    "mode": ("mode", str),
    "trainable_parameters": ("trainable", "{:,}".format),
    "weights_bytes": ("weights", format_bytes),
    "gradients_bytes": ("gradients", format_bytes),
    "optimizer_bytes": ("optimizer", format_bytes),
    "activations_bytes": ("activations", format_bytes),
    "logits_bytes": ("logits", format_bytes),
    "predicted_peak_bytes": ("peak", format_bytes),
    "tuned_bytes": ("tuned file", format_bytes),
    "flops_per_token": ("FLOPs/token", "{:.2e}".format),
}
ASSUMED_TOKENS = 512  # of a row, where there are no rows; a fifth of them are targets

aten = torch.ops.aten
# the argument that is the left matrix of a product
LEFT_MATRIX = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1}
if torch.backends.mkldnn.is_available():
    LEFT_MATRIX[torch.ops.mkldnn._linear_pointwise] = 0


class MemoryMeter(TorchDispatchMode):
    """While entered: the bytes of all live tensors on one kind of device, their peak, the largest tensor of logits,
    and the FLOPs of matrix products. A storage counts once, from the operation that makes it until it is freed.
    Memory that an operation allocates and frees inside itself is not seen."""

    def __init__(self, device_type: str, config: GPTConfig):
        super().__init__()
        self.device_type, self.config = device_type, config
        self.counted: set[int] = set()  # the live storages, by identity
        self.live = self.peak = self.logits = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device_type:
                self.count(tensor)
        self.flops += flops(func, args, result)
        return result

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.counted:
            return
        self.counted.add(id(storage))
        weakref.finalize(storage, self.release, id(storage), storage.nbytes())
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        if self.config.vocab_size in tensor.shape and self.config.n_embd not in tensor.shape:
            self.logits = max(self.logits, storage.nbytes())

    def release(self, storage_id: int, nbytes: int) -> None:
        self.counted.remove(storage_id)
        self.live -= nbytes


def flops(func: Any, args: Any, result: Any) -> int:
    """FLOPs of one operation: 2 per multiply-add of a matrix product, with attention counted as the full T x T square.
    0 for anything else."""
    packet = func.overloadpacket
    if packet in FLOPS:
        return FLOPS[packet](*args)
    if packet in LEFT_MATRIX:
        return 2 * result.numel() * args[LEFT_MATRIX[packet]].shape[-1]
    if "scaled_dot_product" in packet.__name__:
        backward = packet.__name__.endswith("backward")  # the scores again, and four products
        q, k = args[1:3] if backward else args[:2]
        return 2 * (5 if backward else 2) * q.numel() * k.shape[-2]
    return 0


class FakeValues(TorchDispatchMode):
    """Values where fake tensors have none: any single number is 1 (a loss), and nothing is drawn at random."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._local_scalar_dense.default:
            return 1
        if "generator" in kwargs:
            kwargs["generator"] = None
        return func(*args, **kwargs)


def predict(config: Config, meta_model: GPT, batch: Sequence[Row]) -> dict[str, Any]:
    """One mode's cost under the names of COLUMNS, for steps whose micro-batches are all like `batch`. The peak is that
    of a run's own tensors on its device. `meta_model` comes from training.build_on_meta."""
    from torch._subclasses import FakeTensorMode  # imports a large part of torch, and only a plan needs it
    options, device = config.train, choose_device(config.train.device)
    micro_batches = [batch] * min(options.accumulate, 2)  # the second finds the gradients of the first
    rows = local_rows(batch)
    model = copy.deepcopy(meta_model)
    meter = MemoryMeter(device.type, model.config)
    with FakeTensorMode(), FakeValues(), meter:
        fake = {name: torch.empty(p.shape, dtype=p.dtype, device=device) for name, p in model.named_parameters()}
        model.load_state_dict(fake, assign=True)  # model.to(device) refuses to turn meta into fake tensors
        del fake
        model.train()
        optimizer = make_optimizer(model, options.lr, options.weight_decay)
        tuned = modes.tuned_parameters(model)

        before = meter.live
        loss = model.loss(model.pack(rows))
        activations = meter.live - before
        del loss
        for parameter in tuned.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the optimizer's state, which every later step finds
        optimizer.zero_grad(set_to_none=True)

        meter.flops = 0
        train_step(model, micro_batches, options.clip)
        gradients, step_flops = nbytes(p.grad for p in tuned.values()), meter.flops
        optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tokens = sum(len(row.ids) - 1 for row in rows) * len(micro_batches)
    return {
        "mode": config.mode,
        "trainable_parameters": sum(p.numel() for p in tuned.values()),
        "weights_bytes": nbytes(model.parameters()), "gradients_bytes": gradients,
        "optimizer_bytes": nbytes(state), "activations_bytes": activations, "logits_bytes": meter.logits,
        "predicted_peak_bytes": process_bytes(meter.peak, device, model.compute_dtype),
        "tuned_bytes": nbytes(tuned.values()),
        "flops_per_token": step_flops / tokens}


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def report(configs: list[Config]) -> str:
    """The text of train.py --plan: the planned step and a row for each mode. Raises UserError."""
    options, data = configs[0].train, configs[0].data
    device, base = choose_device(options.device), weights.with_eos(weights.load_on_meta(options.model), options.eos)
    models = [build_on_meta(base, config) for config in configs]
    room = base.model.config.n_positions - max(model.prompt_tokens for model in models)
    if data.data and base.tokenizer is not None:
        rows, _ = load_examples(data, options.seed, base.tokenizer, weights.required_eos(base), room, {"train": None})
        batch, origin = largest_batch(rows["train"], options), f"the largest batch of {data.data}"
    else:
        tokens = min(data.max_length or ASSUMED_TOKENS, room)
        batch = [Row([0] * tokens, ((tokens - max(1, tokens // 5), tokens),))] * options.batch
        origin = "assumed: give --data and a folder with a tokenizer to plan with real rows"
    results = [predict(config, model, batch) for config, model in zip(configs, models, strict=True)]
    resident = resident_memory(device)  # after the first plan, as planning is part of every run
    for result in results:
        result["predicted_peak_bytes"] += resident
    dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
    total = sum(p.numel() for p in base.model.parameters())
    return "\n".join([
        f"plan of {options.model}: {total:,} parameters, on {device} in {dtype}; nothing is loaded",
        f"a batch of {len(batch)} rows with {sum(len(row.ids) for row in batch):,} tokens, of which "
        f"{sum(row.num_targets for row in batch):,} are targets ({origin})",
        f"peak: all tensors alive at one time, on a CPU three tenths more for holes in the heap, and the "
        f"{format_bytes(resident)} in use without them",
        "", table(results, COLUMNS)])
