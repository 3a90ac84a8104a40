"""The Triton kernels: on a GPU as they are, elsewhere in triton's interpreter and compiled ahead of time.

tests/conftest.py decides which, before triton is imported. The interpreter runs one program after another, so
it sees wrong numbers but no races, and no speed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, process
from scripts import train as run_train
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: nothing to test, PyTorch computes everything")

from minift import plan, training
from minift.errors import UserError
from minift.files.weights import Base
from minift.model.gpt import GPT, GPTConfig
from minift.model.packing import Row
from minift.ops import dropout_triton, kernel_choice, lora_triton, lora_triton_tiles
from minift.ops.dropout import drop_threshold, keep_mask
from minift.ops.lora import Update, lora_linear, lora_linear_reference
from minift.run import config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="no GPU here, and the interpreter cannot show this")
SCALE = 2.5
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
# M, K, N, r, n, offsets: no multiple of a tile, and both ways of making g and dB (above rank 32, and below)
SHAPES = {"q and v": (70, 50, 90, 5, 30, (0, 60)), "whole": (130, 133, 140, 3, 140, (0,)),
          "q, k, v of one token": (1, 20, 36, 1, 12, (0, 12, 24)),
          "k, rank 70": (37, 24, 300, 70, 100, (100,))}
# Multiples of 16, which take the large tiles and the tensor descriptors of GPT-2's layers, and contiguous
ALIGNED = {"aligned q and v": (200, 80, 288, 8, 96, (0, 192)), "aligned": (300, 208, 272, 16, 272, (0,)),
           "aligned, rank 64": (300, 208, 272, 64, 272, (0,))}
BF16 = torch.bfloat16
CASES = [("triton", torch.float32, name) for name in SHAPES]
CASES += [("triton", torch.float16, "k, rank 70"), ("triton", BF16, "q and v"), ("triton", BF16, "k, rank 70")]
CASES += [("triton", BF16, name) for name in ALIGNED]
CASES += [("hybrid", torch.float32, "q and v"), ("hybrid", BF16, "k, rank 70"), ("hybrid", BF16, "aligned q and v")]
CASES += [("persistent", BF16, "aligned q and v"), ("persistent", torch.float16, "aligned, rank 64"),
          ("persistent", torch.float32, "q and v")]  # fp32 falls back to "triton"


@pytest.fixture(autouse=True)
def poisoned() -> Any:
    """Whatever a kernel leaves unwritten is NaN: torch fills new tensors with it in this mode."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's GPU: loops are split over a few programs, and a persistent program computes many tiles."""
    monkeypatch.setattr(lora_triton_tiles, "WITHOUT_GPU", lora_triton_tiles.Gpu(2, 227))
    monkeypatch.setattr(lora_triton_tiles, "LEAST_BLOCKS", 1)


def operands(shape: tuple, dtype: torch.dtype, seed: int, contiguous: bool = False) -> dict[str, Any]:
    """x is a transposed view, if it need not be contiguous: strides come as they are."""
    M, K, N, r, n, offsets = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE, dtype)

    A, B = draw(len(offsets) * r, K).float(), draw(len(offsets) * n, r).float()  # kept in fp32
    x = draw(M, K) if contiguous else draw(K, M).T
    return {"x": x, "weight": draw(N, K), "bias": draw(N), "A": A, "B": B}


def step(given: dict[str, Any], offsets: tuple[int, ...], dropout: float, kernel: str, dy: Tensor
         ) -> list[Tensor]:
    """y, dx, dA, dB of lora_linear, whose mask follows torch's generator."""
    leaves = {name: t.detach().requires_grad_(name in ("x", "A", "B")) for name, t in given.items()}
    y = lora_linear(**leaves, scale=SCALE, offsets=offsets, dropout=dropout, kernel=kernel)
    y.backward(dy)
    return [y.detach(), leaves["x"].grad, leaves["A"].grad, leaves["B"].grad]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kernel, dtype, name", CASES, ids=str)
def test_against_float64(monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype, name: str, dropout: float
                         ) -> None:
    M, K, N, r, n, offsets = shape = (SHAPES | ALIGNED)[name]
    given = operands(shape, dtype, M + int(10 * dropout), contiguous=name in ALIGNED)
    dy = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).expand(M, N)
    if name in ALIGNED:  # the tiles of large products, for a small one; descriptors need whole rows
        monkeypatch.setattr(lora_triton_tiles, "gemm_time", lambda gpu, M, N, tiles: -tiles["BN"])
        dy = dy.contiguous()
    torch.manual_seed(7)
    got = step(given, offsets, dropout, kernel, dy)
    if DEVICE.type == "cuda":
        torch.manual_seed(7)
        again = step(given, offsets, dropout, kernel, dy)
        assert all(map(torch.equal, got, again))  # bit for bit

    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (), device=DEVICE)
    keep = keep_mask(given["x"], dropout, seed) if dropout else torch.ones_like(given["x"], dtype=torch.bool)
    exact = {key: t.to(dtype).double().requires_grad_(True) for key, t in given.items()}
    dropped = exact["x"] * keep / (1 - dropout)
    zero = torch.zeros_like(exact["weight"])
    wanted = torch.nn.functional.linear(exact["x"], exact["weight"], exact["bias"]) + lora_linear_reference(
        dropped, zero, None, exact["A"], exact["B"], Update(offsets, SCALE))
    wanted.backward(dy.double())
    wanted = [wanted.detach(), exact["x"].grad, exact["A"].grad, exact["B"].grad]
    for what, ours, theirs in zip(("y", "dx", "dA", "dB"), got, wanted, strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype], what
        assert ours.dtype == (torch.float32 if what in ("dA", "dB") else dtype)
    if dtype == torch.float32:
        torch.manual_seed(7)
        for ours, theirs in zip(got, step(given, offsets, dropout, "torch", dy), strict=True):
            assert error(ours, theirs.double()) < 1e-5  # the same mask, or it would be near 1


@pytest.mark.parametrize("rows, columns", [(33, 7), (20, 301), (1, 1)])
def test_masks_are_the_same_bits(rows: int, columns: int) -> None:
    """PyTorch's are checked against Python's numbers in test_dropout.py; made on the CPU here, as on a GPU
    keep_mask is the Triton kernel."""
    x, seed = torch.empty(rows, columns), torch.tensor(2**63 - 12345)
    for rate in (0.1, 0.5):
        ours = dropout_triton.keep_mask(x.to(DEVICE), drop_threshold(rate), seed.to(DEVICE))
        assert torch.equal(ours.cpu(), keep_mask(x, rate, seed))


def test_two_sums_of_many_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator).to(DEVICE) for size in ((37, 5, 3), (2, 300), (1, 1))]
    for pair in (parts[:2], parts[1:]):
        for total, summands in zip(lora_triton.add_two(*pair), pair, strict=True):
            torch.testing.assert_close(total, summands.sum(0))


def test_only_what_is_needed_is_made_and_kept() -> None:
    shape = SHAPES["q and v"]
    given, saved = operands(shape, torch.float32, 0), []
    given["A"].requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(**given, scale=SCALE, offsets=shape[-1], dropout=0.3, kernel="triton")
    own = {given[name].data_ptr() for name in ("x", "weight", "A", "B")}
    others = [tuple(t.shape) for t in saved if t.data_ptr() not in own]
    assert others == [(70, 10)]  # h: tokens x (parts * rank)
    y.sum().backward()
    assert given["A"].grad.abs().sum() > 0 and given["x"].grad is None


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0, 1)])
def test_empty_batches(leading: tuple[int, ...]) -> None:
    given = operands(SHAPES["q and v"], torch.float32, 0)
    given |= {"x": torch.ones(*leading, 50, device=DEVICE, requires_grad=True)}
    A, B = given["A"].requires_grad_(True), given["B"].requires_grad_(True)
    y = lora_linear(**given, scale=SCALE, offsets=(0, 60), dropout=0.5, kernel="triton")
    assert y.shape == (*leading, 90)
    y.sum().backward()
    assert not A.grad.any() and not B.grad.any() and given["x"].grad.shape == (*leading, 50)


@pytest.mark.parametrize("rank", [5, 40])  # both ways of making g and dB
def test_offsets_beyond_32_bits(tmp_path: Path, rank: int) -> None:
    """x, dy and the weight column after column in 10 GB of memory, without a GPU in a file with holes. They
    begin in its middle, so that an offset cut to 32 bits would find zeros."""
    size = 5 * 10**9
    memory = (torch.zeros(size, device=DEVICE, dtype=torch.float16) if DEVICE.type == "cuda" else
              torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=torch.float16))
    M, K, N = 3, 40, 40

    def far(rows: int, columns: int, place: int) -> Tensor:
        view = memory.as_strided((rows, columns), (1, 2**26), 2**31 + place)
        assert view.stride(1) * (columns - 1) > 2**31
        return view.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(place)))

    x, dy, weight = far(M, K, 0), far(M, N, 100), far(N, K, 200)
    A, B = (torch.randn(shape, device=DEVICE).half() for shape in ((rank, K), (N, rank)))
    seed, results = torch.tensor(7, device=DEVICE), []
    for given in ((x, dy, weight), (x.contiguous(), dy.contiguous(), weight.contiguous())):
        a, d, w = given
        y, h = lora_triton.forward(a, w, None, A, B, [0], 2.0, 0.5, seed, "triton")
        results.append([y, *lora_triton.backward(d, a, w, A, B, h, [0], 2.0, 0.5, seed, True, "triton")])
    assert all(map(torch.equal, *results)) and all(one.any() for one in results[0])


SMALL = GPTConfig(vocab_size=61, n_positions=32, n_embd=16, n_layer=1, n_head=2, eos_token_id=0)
BATCH = [Row([7 * i % 60 for i in range(start, start + 9)], ((4, 9),)) for start in range(3)]


def lora_config(text: str) -> config.Config:
    common = f"--mode lora --device {DEVICE.type} --dtype fp32 --max-new-tokens 8"
    [parsed] = config.parse(f"{common} {text}".split(), "")
    return parsed


def test_twenty_steps_of_a_lora_run() -> None:
    losses = {}
    for kernel in ("torch", "triton"):
        settings = lora_config(f"--targets q,v,proj --rank 3 --dropout 0.2 --lr 0.03 --kernel {kernel}")
        torch.manual_seed(0)
        model = GPT(SMALL)
        model.init_weights(0)
        training.apply_config(model, settings)
        model.to(DEVICE).train()
        optimizer = training.make_optimizer(model, settings.train.lr, 0.0)
        losses[kernel] = []
        for _ in range(20):
            loss, _ = training.train_step(model, [BATCH], 1.0).read()
            optimizer.step()
            optimizer.zero_grad()
            losses[kernel].append(loss)
    assert losses["triton"] == pytest.approx(losses["torch"], rel=1e-4)
    assert losses["torch"][-1] < 0.95 * losses["torch"][0]


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_the_plan_counts_the_same(dropout: str) -> None:
    """FLOPs and activations; fake tensors reach no kernel."""
    costs = {}
    for kernel in ("torch", "triton"):
        settings = lora_config(f"--targets q,v,proj --dropout {dropout} --kernel {kernel}")
        with torch.device("meta"):
            base = Base("small", Path(), GPT(SMALL), None, None)
        costs[kernel] = plan.predict(settings, training.build_on_meta(base, settings), BATCH)
    # the mean and 1 / std of 64 tokens, which the Triton kernels of two norms do not keep
    costs["torch"]["activations_bytes"] -= 2 * 64 * 2 * 4
    for name in ("flops_per_token", "activations_bytes", "gradients_bytes", "weights_bytes"):
        assert costs["triton"][name] == pytest.approx(costs["torch"][name], rel=1e-9), name
    assert costs["triton"]["predicted_peak_bytes"] <= costs["torch"]["predicted_peak_bytes"]


def measurement(implementation: str, graph: float, eager: float, **changes: Any) -> dict[str, Any]:
    shape = dict(gpu="sm_90", K=768, N=2304, parts=2, n=768, rank=8, dropout=0.1, tokens=8192)
    return shape | dict(implementation=implementation, ms_graph=graph, ms_eager=eager) | changes


@pytest.fixture
def rule_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty rule."""
    path = tmp_path / "rule.json"
    path.write_text(json.dumps({"about": ["a line"], "classes": {}}))
    monkeypatch.setattr(kernel_choice, "RULE_FILE", path)
    return path


def test_an_implementation_wins_a_class_where_it_is_always_faster(rule_file: Path) -> None:
    here = measurement("torch", 1.0, 2.0)
    name = "sm_90, K 512-1023, rank 16, dropout, tokens 8192-"

    def kernel(*others: dict[str, Any]) -> str:
        kernel_choice.write_rule(rule_file, [here, *others])
        return kernel_choice.read_rule(rule_file)[name]["kernel"]

    assert kernel(measurement("triton", 0.96, 1.99)) == "triton"
    assert kernel(measurement("triton", 0.98, 1.5)) == "torch"  # too little under a graph
    assert kernel(measurement("triton", 0.5, 2.0)) == "torch"  # slower when launched one by one
    assert kernel(measurement("triton", 0.9, 1.5), measurement("hybrid", 0.8, 1.9)) == "hybrid"
    assert kernel(measurement("triton", 0.9, 1.5), measurement("hybrid", 0.8, 2.1)) == "triton"
    wide = measurement("torch", 1.0, 2.0, N=3072, parts=1, n=3072)
    assert kernel(measurement("triton", 0.9, 1.5), wide) == "torch"  # not measured everywhere
    assert kernel(measurement("triton", 0.9, 1.5), wide, wide | measurement("triton", 0.99, 1, N=3072)) == "torch"
    # classes that were not measured again stay, and the lines about the file
    kernel_choice.write_rule(rule_file, [measurement(one, time, time, tokens=512) for one, time in
                                         (("torch", 1.0), ("persistent", 0.9))])
    written = json.loads(rule_file.read_text())
    assert written["about"] == ["a line"] and list(written["classes"]) == [name.replace("8192-", "512-2047"), name]
    assert written["classes"][name.replace("8192-", "512-2047")] == {
        "kernel": "persistent", "graph_ratio": 0.9, "eager_ratio": 0.9, "shapes": 1}


def test_auto_follows_the_rule(monkeypatch: pytest.MonkeyPatch, rule_file: Path) -> None:
    """On fake tensors of a GPU that need not be here."""
    from torch._subclasses import FakeTensorMode
    monkeypatch.setattr(kernel_choice, "why_no_triton", lambda device: None)
    monkeypatch.setattr(kernel_choice, "gpu_generation", lambda device: "sm_90")

    def choice(M: int, K: int = 768, r: int = 8, p: float = 0.1, device: str = "cuda", dtype: torch.dtype = BF16,
               kernel: str = "auto") -> str:
        with FakeTensorMode():
            return kernel_choice.choose(kernel, torch.empty(M, K, dtype=dtype, device=device), r, p)

    assert choice(8192) == "torch"  # the rule is empty
    kernel_choice.write_rule(rule_file, [measurement("torch", 1, 1), measurement("hybrid", 0.5, 0.5)])
    assert choice(8192) == choice(10**6, K=1023, r=16, p=0.5) == choice(9000, dtype=torch.float16) == "hybrid"
    others = (choice(8191), choice(8192, K=1024), choice(8192, r=17), choice(8192, p=0.0), choice(8192, device="cpu"),
              choice(8192, dtype=torch.float32))
    assert set(others) == {"torch"}
    assert choice(1, kernel="triton", device="cpu") == "triton"
    monkeypatch.setattr(kernel_choice, "gpu_generation", lambda device: "sm_80")
    assert choice(8192) == "torch"
    rule_file.write_text(rule_file.read_text().replace('"hybrid"', '"fastest"'))
    kernel_choice.read_rule.cache_clear()
    with pytest.raises(UserError, match="rule.json: 'sm_90, K 512-1023.*'fastest'; it must be one of torch, triton"):
        choice(8192)


def test_the_rule_of_the_project_can_be_read() -> None:
    assert all(" K " in name for name in kernel_choice.read_rule(kernel_choice.RULE_FILE))


def test_where_triton_cannot_run_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_choice.why_no_triton.cache_clear()
    try:
        with pytest.raises(UserError, match="--kernel triton: the kernels need an NVIDIA GPU.*cpu"):
            kernel_choice.check_kernel("triton", torch.device("cpu"))
        kernel_choice.why_no_triton.cache_clear()
        monkeypatch.setattr(kernel_choice.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="triton is not installed"):
            kernel_choice.check_kernel("triton", DEVICE)
        for name in ("auto", "torch"):
            kernel_choice.check_kernel(name, DEVICE)
        monkeypatch.setattr(kernel_choice, "why_no_triton", lambda device: None)
        monkeypatch.setattr(kernel_choice, "gpu_generation", lambda device: "sm_120")
        kernel_choice.check_kernel("hybrid", torch.device("cuda"))
        with pytest.raises(UserError, match="--kernel persistent: it is for sm_90 .* is sm_120; leave it out"):
            kernel_choice.check_kernel("persistent", torch.device("cuda"))
    finally:
        monkeypatch.undo()
        kernel_choice.why_no_triton.cache_clear()
    ended = run_train("--mode", "full", "--kernel", "triton")
    assert ended.code == 2 and "--kernel is about low-rank updates" in ended.err


def test_a_run_on_a_cpu_does_not_import_triton() -> None:
    code = ("import sys, torch, train, minift.plan; from minift.ops.lora import lora_linear;"
            "x = torch.ones(2, 4); lora_linear(x, x, None, x, x.T.contiguous()[:2], 1.0, dropout=0.5);"
            "sys.exit('triton' in sys.modules or 'torch._dynamo' in sys.modules)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode == 0


@GPU
@pytest.mark.parametrize("kernel", kernel_choice.KERNELS[2:])
@pytest.mark.parametrize("M, K, N, offsets", [(8192, 768, 2304, (0, 1536)), (2049, 4096, 4096, (0,))])
def test_large_shapes_against_torch(kernel: str, M: int, K: int, N: int, offsets: tuple[int, ...]) -> None:
    """The Function, which rounds as often, and draws the same masks."""
    kernel_choice.check_kernel(kernel, DEVICE)
    shape = (M, K, N, 8, N // 3 if len(offsets) == 2 else N, offsets)
    given = operands(shape, BF16, 0, contiguous=True)
    dy = torch.randn(M, N, device=DEVICE, dtype=BF16)
    results = {}
    for name in ("torch", kernel):
        torch.manual_seed(7)
        results[name] = step(given, offsets, 0.1, name, dy)
    for ours, theirs in zip(results[kernel], results["torch"], strict=True):
        assert error(ours, theirs.double()) < TOLERANCE[BF16]


@GPU
@pytest.mark.parametrize("kernel", kernel_choice.KERNELS[2:])
def test_a_graph_replays_forward_and_backward(kernel: str) -> None:
    """With new masks in each replay, and without dropout the same numbers as launched one by one."""
    kernel_choice.check_kernel(kernel, DEVICE)
    given, offsets = operands(ALIGNED["aligned q and v"], BF16, 0, contiguous=True), (0, 192)
    dy = torch.randn(200, 288, device=DEVICE, dtype=BF16)
    for dropout in (0.0, 0.5):
        once = step(given, offsets, dropout, kernel, dy)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step(given, offsets, dropout, kernel, dy)  # torch requires a warm-up on another stream
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(given, offsets, dropout, kernel, dy)
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append([t.clone() for t in captured])
        assert all(t.isfinite().all() for t in replays[0])
        equal = [torch.equal(a, b) for a, b in zip(*replays, strict=True)]
        if dropout:
            assert not any(equal[:3])  # y, dx and dA depend on the mask of this replay
        else:
            assert all(equal) and all(map(torch.equal, once, replays[0]))


def test_tiles_fill_the_waves_of_a_gpu() -> None:
    """8,192 x 768 at 128 x 256 is 192 tiles: 1.45 waves of 132 take the time of 2; 384 narrow tiles take 3 of half."""
    H100, A100, RTX_5090 = (lora_triton_tiles.Gpu(*facts) for facts in ((132, 227), (108, 163), (170, 99)))

    def columns(gpu: lora_triton_tiles.Gpu, M: int, N: int, rank: int = 8, dropout: float = 0.0) -> int:
        return lora_triton_tiles.gemm_tiles(gpu, BF16, M, N, 768, rank, dropout)["BN"]

    assert [columns(H100, *shape) for shape in ((8192, 768), (8192, 1280), (2048, 3072))] == [128] * 3
    assert [columns(H100, *shape) for shape in ((8192, 4096), (16384, 3072), (8192, 3072))] == [256] * 3
    assert columns(A100, 8192, 1280) == 256  # 320 wide tiles are 2.96 waves
    assert {columns(H100, 8192, 4096, rank=128), columns(H100, 8192, 4096, dropout=0.1),
            columns(RTX_5090, 8192, 4096)} == {128}


@pytest.mark.parametrize("length, programs, least, wanted", [
    (768, 128, 1, 256), (768, 32, 1, 128), (768, 264, 1, 768), (50, 1, 1, 64), (768, 0, 1, 64),
    (768, 32, 8, 768), (4096, 64, 8, 832), (3072, 22, 8, 512)])  # fmt: skip
def test_loops_are_split_for_two_programs_a_processor(
    monkeypatch: pytest.MonkeyPatch, length: int, programs: int, least: int, wanted: int
) -> None:
    monkeypatch.setattr(lora_triton_tiles, "LEAST_BLOCKS", least)
    assert lora_triton_tiles.split_length(lora_triton_tiles.Gpu(132, 227), length, 64, programs) == wanted


def test_compiled_for_three_gpus_without_one() -> None:
    """No registers spilled, shared memory within the chip's, matrix instructions for 16-bit numbers, and loads that
    overlap with them."""
    ended = process("tests/aot.py", cwd=ROOT, TRITON_INTERPRET="0", timeout=600)
    assert ended.code == 0, ended.err
    compiled = json.loads(ended.out.splitlines()[-1])
    names = {"shrink_kernel", "sum_kernel", "sum_two_kernel", "gemm_kernel", "persistent_kernel", "expand_kernel",
             "outer_kernel", "augment_kernel", "add_kernel", "add_norm_kernel", "add_norm_backward_kernel"}
    without_products = {"sum_kernel", "sum_two_kernel", "augment_kernel", "add_norm_kernel", "add_norm_backward_kernel"}
    assert {one["kernel"] for one in compiled} == names and {one["cc"] for one in compiled} == {80, 90, 120}
    tiles = {(one["cc"], one["constants"]["BN"]) for one in compiled if one["kernel"] == "gemm_kernel"}
    assert tiles >= {(80, 128), (90, 256), (90, 128), (120, 128)}
    for one in compiled:
        assert one["stack"] == 0 and one["registers"] <= 255 and one["shared"] <= one["limit"], one
        if one["kernel"] not in without_products:
            assert one["wgmma" if one["cc"] == 90 else "mma"] > 0, one
        if one["kernel"] in ("shrink_kernel", "expand_kernel") and one["options"]["num_stages"] > 2:
            assert max(one["waits"]) >= 2, one  # groups of loads that are on their way while a product runs
        if one["kernel"] == "persistent_kernel":
            assert one["descriptors"] > 0, one
