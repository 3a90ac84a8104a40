"""The checks of `python -m minift.bench gpu`: every kernel and every mode on the device against the plain references in
float64, which run on the CPU or on the device.

A check yields {"check", "error", "bound", "verdict"}. An error is the norm of the difference over that of the
exact result, so 1e-2 is one percent.
"""

import importlib.util
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minift import modes, ops
from minift.bench.layers import OUR_KERNELS, SCALE, Case, make_ring
from minift.device import dtype_name
from minift.graphs import make_graphs
from minift.model.generate import generate
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row, pack
from minift.modes import MODES
from minift.ops.attention import attention, attention_reference
from minift.ops.cross_entropy import cross_entropy, cross_entropy_reference
from minift.ops.dropout import dropout_reference, keep_mask
from minift.ops.gelu import gelu_tanh
from minift.ops.kernel_choice import check_kernel
from minift.ops.lora import lora_linear
from minift.ops.norm import add_norm, add_norm_reference
from minift.run.config import TrainOptions
from minift.training import apply_step, make_optimizer, train_step

ROOT = Path(__file__).parents[2]
Result = dict[str, Any]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# gradients of a model of several layers, where the errors of rounding add up
MODEL_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
SHAPE = GPTConfig(vocab_size=211, n_positions=160, n_embd=128, n_layer=2, n_head=2, eos_token_id=0)  # hs = 64
LENGTHS = (70, 3, 128, 41, 1)  # of rows
TESTS = ("test_triton.py", "test_norm.py", "test_flash_attention.py", "test_graphs.py", "test_lora_op.py")


def verdict(check: str, error: float, bound: float) -> Result:
    return {"table": "checks", "check": check, "error": error, "bound": bound,
            "verdict": "right" if error <= bound else "WRONG"}  # also for nan


def relative_error(got: Tensor, exact: Tensor) -> float:
    difference = got.detach().double().cpu() - exact.detach().double().cpu()
    return (difference.norm() / exact.detach().double().norm().cpu()).item()


def gradients(output: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, leaves, dy)]


def worst_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of several tensors; nan if one has it, since max would drop it."""
    errors = [relative_error(a, b) for a, b in zip(got, exact, strict=True)]
    return torch.tensor(errors).max().item()


# ---- operations

def check_masks(device: torch.device) -> Iterator[Result]:
    """The mask of dropout on the device has the same bits as the reference on the CPU."""
    for rows, columns in ((33, 7), (200, 301)):
        x, seed = torch.ones(rows, columns), torch.tensor(2**62 + 12345)
        expected = dropout_reference(x, 0.1, seed) != 0
        got = keep_mask(x.to(device), 0.1, seed.to(device)).cpu()
        wrong = (got != expected).sum().item()
        yield verdict(f"dropout's mask, {rows} x {columns}", wrong, 0)


def check_layer(case: Case, kernel: str, dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """lora_linear and its gradients against the plain reference in float64, with the same mask."""
    check_kernel(kernel, device)
    layer = make_ring(case, dtype, device, 0)[0]
    names = ("x", "weight", "bias", "A", "B")

    def step(tensors: dict[str, Tensor], dy: Tensor, kernel: str) -> list[Tensor]:
        leaves = {name: tensors[name].detach().requires_grad_(name in ("x", "A", "B")) for name in names}
        torch.manual_seed(7)  # of the mask
        y = lora_linear(**leaves, scale=SCALE, offsets=case.offsets, dropout=case.dropout, kernel=kernel)
        return gradients(y, [leaves["x"], leaves["A"], leaves["B"]], dy)

    got = step(layer, layer["dy"], kernel)
    with mock.patch.object(ops, "plain", True):
        exact = step({name: layer[name].double() for name in names}, layer["dy"].double(), "torch")
    for name, ours, theirs in zip(("y", "dx", "dA", "dB"), got, exact, strict=True):
        yield verdict(f"{kernel}, {case}, {dtype_name(dtype)}: {name}", relative_error(ours, theirs), BOUNDS[dtype])


def check_replay(case: Case, kernel: str, device: torch.device) -> Iterator[Result]:
    """Forward and backward pass replayed from a CUDA graph give the same values as launched one by one."""
    check_kernel(kernel, device)
    layer = make_ring(case, torch.bfloat16, device, 0)[0]
    leaves = [layer[name] for name in ("x", "A", "B")]

    def step() -> list[Tensor]:
        y = lora_linear(layer["x"], layer["weight"], layer["bias"], layer["A"], layer["B"], SCALE, case.offsets,
                        0.0, kernel)
        return gradients(y, leaves, layer["dy"])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [tensor.detach().clone() for tensor in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor in got:
        tensor.detach().zero_()  # so that only a replay that writes can be right
    graph.replay()
    yield verdict(f"{kernel}, {case}: replayed from a graph", worst_error(got, expected), BOUNDS[torch.bfloat16])


def check_attention(dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """Attention of ragged rows and its gradient, without the filler, whose outputs have no meaning."""
    torch.manual_seed(1)
    rows = pack(ragged_rows(), 0, device, False).rows
    qkv = torch.randn(len(rows.positions), 3 * 128, device=device).to(dtype).requires_grad_()
    dy = torch.randn(len(qkv), 128, device=device).to(dtype)
    dy[rows.num_tokens :] = 0
    exact_qkv = qkv.detach().double().requires_grad_()
    got = gradients(attention(qkv, rows, 2, 0.125, 0.0), [qkv], dy)
    exact = gradients(attention_reference(exact_qkv, rows, 2, 0.125, 0.0), [exact_qkv], dy.double())
    got, exact = ([tensor[: rows.num_tokens] for tensor in tensors] for tensors in (got, exact))
    yield verdict(f"attention, {dtype_name(dtype)}", worst_error(got, exact), BOUNDS[dtype])


def check_attention_dropout(device: torch.device) -> Iterator[Result]:
    """The mean of 64 draws is near the result without dropout: 0.1 of the probabilities are dropped, the others
    scaled. A draw alone is 0.2 and more away."""
    torch.manual_seed(1)
    rows = pack(ragged_rows(), 0, device, False).rows
    qkv = torch.randn(len(rows.positions), 3 * 128, device=device).bfloat16()
    exact = attention_reference(qkv.double(), rows, 2, 0.125, 0.0)[: rows.num_tokens]
    draws = [attention(qkv, rows, 2, 0.125, 0.1)[: rows.num_tokens].double() for _ in range(64)]
    yield verdict("attention's dropout, mean of 64 draws", relative_error(sum(draws) / 64, exact), 0.1)
    alone = relative_error(draws[0], exact)
    yield verdict("attention's dropout, 1 / error of one draw", 1 / max(alone, 1e-9), 5)


def check_head(dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """The loss and its gradients, and GELU."""
    torch.manual_seed(2)
    hidden = torch.randn(300, 64, device=device).to(dtype).requires_grad_()
    weight = torch.randn(997, 64, device=device).to(dtype).requires_grad_()
    targets = torch.randint(997, (300,), device=device)
    one = torch.ones((), device=device)
    exact_leaves = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    loss = cross_entropy(hidden, weight, targets)
    exact_loss = cross_entropy_reference(*exact_leaves, targets)
    got = gradients(loss, [hidden, weight], one.to(loss.dtype))
    exact = gradients(exact_loss, exact_leaves, one.double())
    yield verdict(f"cross-entropy, {dtype_name(dtype)}", worst_error(got, exact), BOUNDS[dtype])
    exact_gelu = torch.nn.functional.gelu(exact_leaves[0], approximate="tanh")
    yield verdict(f"GELU, {dtype_name(dtype)}", relative_error(gelu_tanh(hidden), exact_gelu), BOUNDS[dtype])


def check_norm(rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """The kernels of x + branch and its norm, and their gradient."""
    check_kernel("triton", device)
    torch.manual_seed(3)
    x, branch, dsum, dnormed = (torch.randn(rows, 768, device=device).to(dtype) for _ in range(4))
    weight, bias = torch.randn(2, 768, device=device).to(dtype)
    leaf, exact_leaf = x.requires_grad_(), x.detach().double().requires_grad_()

    def outputs(found: tuple[Tensor, Tensor], leaf: Tensor) -> list[Tensor]:
        return [*found, *torch.autograd.grad(found, leaf, [dy.to(leaf.dtype) for dy in (dsum, dnormed)])]

    got = outputs(add_norm(leaf, branch, weight, bias, 1e-5, "triton"), leaf)
    exact = outputs(add_norm_reference(exact_leaf, branch.double(), weight.double(), bias.double(), 1e-5), exact_leaf)
    yield verdict(f"x + branch and its norm, {dtype_name(dtype)}", worst_error(got, exact), BOUNDS[dtype])


# ---- models

def small_model(mode: str, kernel: str, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model in a mode, with values at which every parameter matters."""
    torch.manual_seed(3)
    model = GPT(SHAPE)
    model.init_weights(0)
    modes.apply(model, mode, MODES[mode].Options())
    for parameter in model.parameters():
        if parameter.dim() == 2:  # LoRA's B and the adapters' output would be 0
            torch.nn.init.normal_(parameter, std=0.1)
    model.set_compute_dtype(dtype)
    model.set_kernel(kernel)
    return model.to(device).train()


def ragged_rows() -> list[Row]:
    rng, rows = random.Random(4), []
    for length in LENGTHS:
        ids = [rng.randrange(SHAPE.vocab_size) for _ in range(length + 1)]
        rows.append(Row(ids, ((max(1, length - 20), length + 1),)))
    return rows


def check_mode(mode: str, kernel: str, dtype: torch.dtype, device: torch.device) -> Iterator[Result]:
    """The loss of ragged rows and the gradient of every tuned parameter."""
    check_kernel(kernel, device)
    rows, name = ragged_rows(), f"{mode}{', ' + kernel if MODES[mode].uses_kernel else ''}, {dtype_name(dtype)}"

    def loss_and_gradients(model: GPT) -> list[Tensor]:
        tuned = list(modes.tuned_parameters(model).values())
        loss = model.loss(model.pack(rows)).double()
        return [loss.detach(), *torch.autograd.grad(loss, tuned)]

    got = loss_and_gradients(small_model(mode, kernel, dtype, device))
    with mock.patch.object(ops, "plain", True):
        exact = loss_and_gradients(small_model(mode, "torch", torch.float64, torch.device("cpu")))
    # as one vector: single gradients that are almost 0, such as that of a key's bias, have only errors of rounding
    vectors = [torch.cat([tensor.double().cpu().flatten() for tensor in tensors[1:]]) for tensors in (got, exact)]
    yield verdict(f"{name}: loss", relative_error(got[0], exact[0]), MODEL_BOUNDS[dtype])
    yield verdict(f"{name}: gradients", relative_error(*vectors), MODEL_BOUNDS[dtype])


def check_steps(mode: str, kernel: str, device: torch.device) -> Iterator[Result]:
    """The losses of 8 steps in fp32 against those of the plain references on the CPU."""
    def losses(model: GPT) -> Tensor:
        optimizer, found = make_optimizer(model, 1e-3, 0.0), []
        for _ in range(8):
            result = train_step(model, [ragged_rows()], 1.0)
            apply_step(optimizer, result)
            found.append(result.read()[0])
        return torch.tensor(found)

    got = losses(small_model(mode, kernel, torch.float32, device))
    with mock.patch.object(ops, "plain", True):
        expected = losses(small_model(mode, "torch", torch.float32, torch.device("cpu")))
    yield verdict(f"{mode}: losses of 8 steps, float32", relative_error(got, expected), MODEL_BOUNDS[torch.float32])


def check_graphs(mode: str, device: torch.device) -> Iterator[Result]:
    """The losses of steps from CUDA graphs, of two buckets in turn, against those without."""
    def losses(graphs: str) -> Tensor:
        model = small_model(mode, "auto", torch.bfloat16, device)
        optimizer, found = make_optimizer(model, 1e-3, 0.0), []
        settings = TrainOptions(graphs=graphs, device=device.type, dtype="bf16", batch=len(LENGTHS))
        runner = make_graphs(model, optimizer, settings, modes.tuned_parameters(model).values())
        for _ in range(4):
            for rows in (ragged_rows(), ragged_rows()[:2]):
                if runner:
                    result = runner.step([rows])
                else:
                    result = train_step(model, [rows], settings.clip)
                    apply_step(optimizer, result)
                found.append(result.read()[0])
        assert (runner is None) == (graphs == "off"), "graphs cannot be made here"
        return torch.tensor(found)

    error = relative_error(losses("on"), losses("off"))
    yield verdict(f"{mode}: losses of 8 steps with graphs and without, bfloat16", error, 1e-3)


def check_decoding(device: torch.device) -> Iterator[Result]:
    """Tokens of greedy decoding with the cache against those of the whole row, in float32."""
    model = small_model("lora", "auto", torch.float32, device).eval()
    prompts, new = [row.ids[:20] for row in ragged_rows()], 6
    wrong = 0
    for prompt, answer in zip(prompts, generate(model, prompts, new), strict=True):
        row = Row([*prompt, *answer, 0], ())
        with torch.no_grad():
            hidden = model.hidden(model.pack([row]))[len(prompt) - 1 : len(prompt) - 1 + new]
        wrong += sum(a != b for a, b in zip(model.logits(hidden).argmax(-1).tolist(), answer, strict=True))
    yield verdict("decoding with a cache: other tokens than without", wrong, 0)


def check_tests(file: str) -> Iterator[Result]:
    """A file of the tests, on this device: the number of failed ones."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"tests/{file}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (ended.stdout.strip().splitlines() or ["no output"])[-1]
    yield verdict(f"tests/{file}: {last}", ended.returncode, 0)


# ---- the list

Check = Callable[[], Iterator[Result]]


def checks(device: torch.device, dry: bool) -> dict[str, Check]:
    """{name: check}, the most important first."""
    dtypes = (torch.float32,) if dry else (torch.bfloat16, torch.float32)
    found: dict[str, Check] = {"masks": partial(check_masks, device)}
    for dtype in dtypes:
        found[f"attention, {dtype_name(dtype)}"] = partial(check_attention, dtype, device)
        found[f"head, {dtype_name(dtype)}"] = partial(check_head, dtype, device)
    if not dry:
        found["attention's dropout"] = partial(check_attention_dropout, device)
    found |= layer_checks(device, dry)
    for dtype in dtypes:
        found[f"norm, {dtype_name(dtype)}"] = partial(check_norm, 5 if dry else 2049, dtype, device)
        for mode in MODES:
            for kernel in OUR_KERNELS if MODES[mode].uses_kernel and not dry else ("torch",):
                found[f"{mode}, {kernel}, {dtype_name(dtype)}"] = partial(check_mode, mode, kernel, dtype, device)
    for mode in ("lora",) if dry else MODES:
        found[f"{mode}, steps"] = partial(check_steps, mode, "auto", device)
    if not dry:
        for mode in MODES:
            found[f"{mode}, graphs"] = partial(check_graphs, mode, device)
    found["decoding"] = partial(check_decoding, device)
    if not dry and importlib.util.find_spec("pytest"):
        for file in TESTS:
            if (ROOT / "tests" / file).exists():
                found[f"tests/{file}"] = partial(check_tests, file)
    return found


def layer_checks(device: torch.device, dry: bool) -> dict[str, Check]:
    """Layers of GPT-2, which take the large tiles, and odd shapes."""
    large = [Case(768, 2304, 8192, 8, 0.0, "qv"), Case(768, 2304, 8192, 16, 0.1, "qkv"),
             Case(4096, 4096, 2049, 16, 0.0), Case(4096, 4096, 2049, 16, 0.1), Case(768, 3072, 2048, 8, 0.1),
             Case(3072, 768, 2049, 64, 0.0)]
    odd = [Case(50, 90, 70, 5, 0.3, "qv"), Case(133, 140, 130, 3, 0.0)]
    pairs = [(case, torch.bfloat16) for case in large + odd] + [(case, torch.float32) for case in odd]
    if dry:
        pairs = [(Case(24, 36, 20, 3, 0.3, "qv"), torch.float32)]
    found: dict[str, Check] = {}
    for case, dtype in pairs:
        for kernel in OUR_KERNELS:
            found[f"{kernel}, {case}, {dtype_name(dtype)}"] = partial(check_layer, case, kernel, dtype, device)
    if not dry:
        for kernel in OUR_KERNELS:
            case = Case(768, 2304, 2049, 8, 0.0, "qv")
            found[f"{kernel}, replay"] = partial(check_replay, case, kernel, device)
    return found
