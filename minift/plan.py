"""The cost of a run before it starts: python train.py --plan, without weights and without a network.

There are no formulas that could differ from the code. The training step of the real model runs on torch's fake tensors,
which have a shape, a dtype and a device, but no values and no memory.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import modes
from minift.data.dataset import load_examples
from minift.device import (
    choose_device,
    choose_dtype,
    compiled_code_bytes,
    dtype_name,
    process_bytes,
    resident_memory,
)
from minift.distributed import local_rows
from minift.files import weights
from minift.graphs import why_no_graphs
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row
from minift.ops import FLOPS
from minift.report.table import format_bytes, table
from minift.report.trials_table import option_words
from minift.run.config import Config
from minift.training import build_on_meta, count_totals, largest_batch, make_optimizer, train_step

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
ASSUMED_TOKENS = 512  # tokens of a row, for a plan without rows; a fifth of them are targets
ASSUMED_TOTALS = 15  # different batch sizes in tokens, without rows

aten = torch.ops.aten
# {matrix product: the number of the argument that is its left matrix}
LEFT_MATRIX = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1}
if torch.backends.mkldnn.is_available():
    LEFT_MATRIX[torch.ops.mkldnn._linear_pointwise] = 0


class MemoryMeter(TorchDispatchMode):
    """While entered: the bytes of all live tensors on one kind of device, their peak, the largest tensor of logits,
    and the FLOPs of matrix products.

    A storage counts once, however many tensors view it, from the operation that creates it until it is freed. Memory
    that an operation allocates and frees inside itself is not seen.
    """

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
        weakref.finalize(storage, self.release, id(storage), storage.nbytes())  # calls release when it is freed
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        # logits have V in their shape, and so have the token embedding and its gradient, with C
        if self.config.vocab_size in tensor.shape and self.config.n_embd not in tensor.shape:
            self.logits = max(self.logits, storage.nbytes())

    def release(self, storage_id: int, nbytes: int) -> None:
        self.counted.remove(storage_id)
        self.live -= nbytes


def flops(func: Any, args: Any, result: Any) -> int:
    """FLOPs of one operation: 2 per multiply-add of a matrix product, with attention counted as the full T x T square.
    0 for anything else."""
    packet = func.overloadpacket  # the operation, such as aten.mm, for all types of arguments
    if packet in FLOPS:
        return FLOPS[packet](*args)
    if packet in LEFT_MATRIX:
        left = args[LEFT_MATRIX[packet]]
        return 2 * result.numel() * left.shape[-1]  # every element of (M, N) sums K products
    name = packet.__name__
    is_packed = name.startswith("_flash_attention")
    if "scaled_dot_product" in name or is_packed:  # torch has one for each kind of device
        is_backward = name.endswith("backward")
        q, k = args[1:3] if is_backward else args[:2]
        # forward: q k^T and probabilities v; backward: the scores again, and the gradients of probabilities, q, k and v
        products = 5 if is_backward else 2
        T = k.shape[-2]
        if is_packed:  # q is (N, nh, hs), and the longest row the argument after the two cu_seqlens
            T = args[8 if is_backward else 5]
        return 2 * products * q.numel() * T
    return 0


class FakeValues(TorchDispatchMode):
    """While entered: operations that need values, which fake tensors do not have, get invented ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten._local_scalar_dense.default:  # tensor.item(), such as of a loss
            return 1
        if "generator" in kwargs:  # nothing is drawn at random
            kwargs["generator"] = None
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def make_fake(model: GPT, device: torch.device) -> None:
    """Replace every parameter and buffer by a fake tensor on a device; model.to(device) refuses to. A tensor that
    several modules share stays shared."""
    fakes: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


def predict(config: Config, meta_model: GPT, batch: Sequence[Row]) -> dict[str, Any]:
    """One mode's cost under the names of COLUMNS, if every micro-batch is like `batch`. The peak is that of the run's
    tensors on its device, with the holes between them. `meta_model` comes from training.build_on_meta."""
    from torch._subclasses import FakeTensorMode  # imports a large part of torch, and only a plan needs it
    options = config.train
    device = choose_device(options.device)
    # two are enough for the peak: in the second, the gradients of the first are there, as in every later one
    micro_batches = [batch] * min(options.accumulate, 2)
    rows = local_rows(batch)
    model = copy.deepcopy(meta_model)
    meter = MemoryMeter(device.type, model.config)
    with FakeTensorMode(), FakeValues(), meter:
        make_fake(model, device)
        model.train()
        optimizer = make_optimizer(model, options.lr, options.weight_decay)
        tuned = modes.tuned_parameters(model)

        # activations: the memory that a forward pass leaves for the backward pass
        before = meter.live
        loss = model.loss(model.pack(rows))
        activations = meter.live - before
        del loss

        # the first step creates the optimizer's state, which is there in every later step
        for parameter in tuned.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a later step has the peak
        meter.flops = 0
        train_step(model, micro_batches, options.clip)
        gradients = nbytes(p.grad for p in tuned.values())
        step_flops = meter.flops
        optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    tokens = sum(len(row.ids) - 1 for row in rows) * len(micro_batches)  # a row's last token is a target only
    return {
        "mode": config.mode,
        "trainable_parameters": sum(p.numel() for p in tuned.values()),
        "weights_bytes": nbytes(model.parameters()),
        "gradients_bytes": gradients,
        "optimizer_bytes": nbytes(state),
        "activations_bytes": activations,
        "logits_bytes": meter.logits,
        "predicted_peak_bytes": process_bytes(meter.peak, device),
        "tuned_bytes": nbytes(tuned.values()),
        "flops_per_token": step_flops / tokens,
    }


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def report(configs: list[Config]) -> str:
    """The text of train.py --plan: the planned step and a row for each mode, in a search for the setting that needs the
    most memory. Raises UserError."""
    options, data = configs[0].train, configs[0].data  # all modes of a comparison share them, but for lr and decay
    device = choose_device(options.device)
    base = weights.with_eos(weights.load_on_meta(options.model), options.eos)
    # learning rates need the same memory, so settings differ by the options of the mode
    settings = [list({setting.mode_options: setting for setting in config.settings}.values()) for config in configs]
    models = [[build_on_meta(base, setting) for setting in of_mode] for of_mode in settings]
    # all modes train on the same rows, so the mode with the most reserved positions limits their length
    reserved = max(model.prompt_tokens for of_mode in models for model in of_mode)
    max_tokens = base.model.config.n_positions - reserved
    if data.data and base.tokenizer is not None:
        rows, *_ = load_examples(data, options.seed, base.tokenizer, weights.required_eos(base), max_tokens,
                                options.row_limits)  # of a run, whose cache is then used
        batch = largest_batch(rows["train"], options)
        totals = count_totals(rows["train"], options)
        origin = f"the largest batch of {data.data}"
    else:
        tokens = min(data.max_length or ASSUMED_TOKENS, max_tokens)
        num_targets = max(1, tokens // 5)
        batch = [Row([0] * tokens, ((tokens - num_targets, tokens),))] * options.batch
        totals = ASSUMED_TOTALS
        origin = "assumed: give --data and a folder with a tokenizer to plan with real rows"
    results = []
    for of_mode, their_models in zip(settings, models, strict=True):
        costs = []
        for setting, model in zip(of_mode, their_models, strict=True):
            cost = predict(setting, model, batch)
            if len(of_mode) > 1:
                searched = {name: getattr(setting.mode_options, name) for name in setting.search if name != "lr"}
                cost["mode"] += f", {option_words(searched)}"
            costs.append(cost)
        results.append(max(costs, key=lambda cost: cost["predicted_peak_bytes"]))
    # measured after planning, which needs memory too and is part of every run
    resident = resident_memory(device)
    resident += compiled_code_bytes(device, choose_dtype(options.dtype, device), totals)
    for result in results:
        result["predicted_peak_bytes"] += resident
    dtype = dtype_name(choose_dtype(options.dtype, device))
    parameters = sum(p.numel() for p in base.model.parameters())
    graphs_note = ""
    if options.graphs != "off" and not why_no_graphs(options, base.model.config):
        graphs_note = "; the memory of CUDA graphs is not counted (--graphs off saves it)"
    batch_tokens = sum(len(row.ids) for row in batch)
    batch_targets = sum(row.num_targets for row in batch)
    return "\n".join([
        f"plan of {options.model}: {parameters:,} parameters, on {device} in {dtype}; nothing is loaded",
        f"a batch of {len(batch)} rows with {batch_tokens:,} tokens, of which {batch_targets:,} are targets ({origin})",
        f"peak: all tensors alive at one time, on a CPU three tenths more for holes in the heap, and the "
        f"{format_bytes(resident)} of the process without them{graphs_note}",
        "", table(results, COLUMNS)])
