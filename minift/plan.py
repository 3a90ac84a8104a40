"""What a run will cost, before it starts: python train.py --plan, without weights and without a network.

No formula stands here: the real training step of the real model in the real mode runs on torch's fake
tensors, which have a shape, a dtype and a device, but no memory. So the plan follows the code, whatever
changes there.
"""

import copy
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minift import distributed as parallel
from minift import modes
from minift.data.dataset import Example, collate, load_examples
from minift.device import choose_device, choose_dtype, resident_memory, taken
from minift.files import weights
from minift.model.gpt import GPT, GPTConfig
from minift.ops import register as operators
from minift.report import compare
from minift.run.config import Config, as_model

COLUMNS = {
    "mode": "mode",
    "trainable_parameters": "trainable",
    "weights_bytes": "weights",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "activations_bytes": "activations",
    "logits_bytes": "logits",
    "predicted_peak_bytes": "peak",
    "tuned_bytes": "tuned file",
    "flops_per_token": "FLOPs/token",
}
ASSUMED_TOKENS = 512  # of a row, where no rows are at hand; a fifth of them are targets

aten = torch.ops.aten
LEFT_MATRIX = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1}  # its place in args
if torch.backends.mkldnn.is_available():
    LEFT_MATRIX[torch.ops.mkldnn._linear_pointwise] = 0


class Meter(TorchDispatchMode):
    """While it is entered: bytes of all live tensors on one kind of device, their peak, the largest tensor of
    logits, and the FLOPs of matrix products. A storage counts once, from the operation that made it until it
    is freed. What an operation allocates inside itself is not seen."""

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
    """Of one operation: two for each product of a matrix product, attention's included (its whole square: the
    causal half is not taken off, as usual). 0 for anything else."""
    packet = func.overloadpacket
    if packet in operators.FLOPS:
        return operators.FLOPS[packet](*args)
    if packet in LEFT_MATRIX:
        return 2 * result.numel() * args[LEFT_MATRIX[packet]].shape[-1]
    if "scaled_dot_product" in packet.__name__:
        backward = packet.__name__.endswith("backward")  # the scores once more, and four products
        q, k = args[1:3] if backward else args[:2]
        return 2 * (5 if backward else 2) * q.numel() * k.shape[-2]
    return 0


class Answers(TorchDispatchMode):
    """What fake tensors cannot know, as they hold no values: how many targets a batch has, any single number
    (a loss; 1 is as good as another), and what a random generator would draw."""

    def __init__(self, targets: int):
        super().__init__()
        self.targets = targets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is aten.nonzero.default:
            return args[0].new_empty((self.targets, args[0].dim()), dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            return 1
        if "generator" in kwargs:
            kwargs["generator"] = None
        return func(*args, **kwargs)


def predict(asked: Config, shape: GPT, batch: list[Example], prepare: Callable[..., None],
            make_optimizer: Callable[..., torch.optim.Optimizer], train_step: Callable[..., Any]
            ) -> dict[str, Any]:
    """One mode's costs under the names of COLUMNS, for steps whose micro-batches are all like `batch`. The
    peak is that of live tensors alone, on the run's device. `shape` is a base on the meta device; the three
    functions are train.py's."""
    from torch._subclasses import FakeTensorMode
    options, device = asked.train, choose_device(asked.train.device)
    micro_batches = [batch] * min(options.accumulate, 2)  # the second finds the gradients of the first
    model = copy.deepcopy(shape)
    meter = Meter(device.type, model.config)
    rows = parallel.share(batch)
    answers = Answers(sum(len(example.ids) - example.n_prompt for example in rows))
    with FakeTensorMode(), answers, meter:
        empty = {name: torch.empty(p.shape) for name, p in model.named_parameters()}
        model.load_state_dict(empty, assign=True)
        del empty
        prepare(model, asked)
        placed = {name: tensor.to(device) for name, tensor in model.state_dict().items()}
        model.load_state_dict(placed, assign=True)  # as model.to(device) does, which refuses fake tensors
        del placed
        model.train()
        optimizer = make_optimizer(model, options.lr, options.weight_decay)
        tuned = modes.tuned_parameters(model)

        before = meter.live
        ids, targets, lengths = collate(rows, pad_id=0)
        loss = model.loss(ids.to(device), targets, lengths)
        activations = meter.live - before
        del loss
        for parameter in tuned.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the optimizer's state, which every later step finds there
        optimizer.zero_grad(set_to_none=True)

        meter.flops = 0
        train_step(model, micro_batches, options.clip)
        gradients, step_flops = nbytes(p.grad for p in tuned.values()), meter.flops
        optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return {
        "mode": asked.mode,
        "trainable_parameters": sum(p.numel() for p in tuned.values()),
        "weights_bytes": nbytes(model.parameters()), "gradients_bytes": gradients,
        "optimizer_bytes": nbytes(state), "activations_bytes": activations, "logits_bytes": meter.logits,
        "predicted_peak_bytes": taken(meter.peak, device, model.compute_dtype),
        "tuned_bytes": nbytes(tuned.values()),
        "flops_per_token": step_flops / (sum(lengths) * len(micro_batches))}


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def report(asked: dict[str, Config], prepare: Callable[..., None],
           make_optimizer: Callable[..., torch.optim.Optimizer], train_step: Callable[..., Any],
           widest_batch: Callable[..., list[Example]]) -> str:
    """What train.py --plan prints: the step that is planned and a row for each mode. The four functions are
    train.py's. Raises UserError."""
    first = next(iter(asked.values()))
    options, device = first.train, choose_device(first.train.device)
    shape = as_model(weights.load_on_meta(options.model))
    room = shape.config.n_positions - max(one.prompt_tokens for one in asked.values())
    if first.data.data and shape.tokenizer is not None:
        rows, _ = load_examples(first.data, options.seed, shape, room, {"train": None})
        batch, origin = widest_batch(rows["train"], options), f"the widest batch of {first.data.data}"
    else:
        tokens = min(first.data.max_length or ASSUMED_TOKENS, room)
        batch = [Example([0] * tokens, tokens - max(1, tokens // 5), None)] * options.batch
        origin = "assumed: give --data and a folder with a tokenizer to plan with real rows"

    def costs(one: Config) -> dict[str, Any]:
        return predict(one, shape, batch, prepare, make_optimizer, train_step)

    results = [costs(one) for one in asked.values()]
    resident = resident_memory(device)  # after the first plan, as planning is part of every run
    for result in results:
        result["predicted_peak_bytes"] += resident
    dtype = str(choose_dtype(options.dtype, device)).removeprefix("torch.")
    lines = [f"plan of {options.model}: {sum(p.numel() for p in shape.parameters()):,} parameters, on "
             f"{device} in {dtype}; nothing is loaded",
             f"a batch of {len(batch)} rows with {sum(len(e.ids) for e in batch):,} tokens, of which "
             f"{sum(len(e.ids) - e.n_prompt for e in batch):,} are targets ({origin})",
             f"peak: all tensors alive at one time, on a CPU a fifth more for the heap's holes, and the "
             f"{compare.size(resident)} in use without them",
             "", compare.table(results, COLUMNS)]
    if options.model == "gpt3-175b":
        in_bf16 = replace(first, train=replace(options, dtype="bf16"))
        lines += ["", "on paper: " + beside_the_paper(in_bf16, costs)]
    return "\n".join(lines)


def beside_the_paper(asked: Config, costs: Callable[[Config], dict[str, Any]]) -> str:
    """Hu et al. 2021, section 4.2, on GPT-3 175B, and this plan's figures in the same units."""
    full = costs(replace(asked, mode="full", own=modes.MODES["full"].Options()))
    lora = costs(replace(asked, mode="lora", own=modes.MODES["lora"].Options(rank=4, targets="q,v")))

    def parts(result: dict[str, Any]) -> str:
        gb = {name: result[f"{name}_bytes"] / 1e9 for name in ("weights", "gradients", "optimizer")}
        return (f"{sum(gb.values()):,.0f} GB ({', '.join(f'{name} {n:,.1f}' for name, n in gb.items())}) and "
                f"{result['activations_bytes'] / 1e9:,.0f} GB of activations")

    count = lora["trainable_parameters"]
    return ("the LoRA paper says 1.2 TB of memory for full tuning and 350 GB for LoRA (r = 4 on q and v), "
            "but not what is in them; 350 GB are the weights alone, in two bytes each. Computing in bf16, "
            f"this plan has {parts(full)} for full tuning, with weights, gradients and Adam moments in fp32; "
            f"{parts(lora)} for LoRA, with frozen weights in bf16. LoRA trains {count:,} parameters: "
            f"{count * 2 / 1e6:.1f} MB in fp16, where the paper says 35 MB, and "
            f"{lora['tuned_bytes'] / 1e6:.1f} MB as saved here, in fp32.")
