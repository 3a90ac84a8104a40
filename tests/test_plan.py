"""minift/plan.py: exact counts, exact bytes, and a peak that a real step on real tensors has too."""

import copy
import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import MODES, one_thread, process
from scripts import train as run_train
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minift import modes, plan
from minift.device import process_bytes
from minift.errors import UserError
from minift.files import weights
from minift.files.hub import PRESETS
from minift.model.gpt import GPT, GPTConfig, Linear
from minift.model.packing import Row
from minift.modes.lora import LoRALinear
from minift.run import config
from minift.run.config import Config
from minift.training import apply_config, make_optimizer, train_step

SHAPE = GPTConfig(vocab_size=311, n_positions=64, n_embd=48, n_layer=3, n_head=4, eos_token_id=0)
BATCH = [Row([5] * 40, ((25, 40),)), Row([7] * 31, ((8, 31),)), Row([9] * 20, ((18, 20),))]
COUNTS = {  # gpt2, gpt2-medium, gpt2-large, gpt2-xl
    "full": (124_439_808, 354_823_168, 774_030_080, 1_557_611_200),
    "selective --train top:2": (14_175_744, 25_192_448, 39_354_880, 61_481_600),
    "selective --train top:2,final": (14_177_280, 25_194_496, 39_357_440, 61_484_800),
    "selective --train bias": (102_144, 271_360, 508_160, 846_400),
    "selective --train norm": (38_400, 100_352, 186_880, 310_400),
    "lora --rank 4 --targets q,v": (147_456, 393_216, 737_280, 1_228_800),
    "lora --rank 8 --targets qkv,o,fc,proj": (1_179_648, 3_145_728, 5_898_240, 9_830_400),
    "prompt --prompt-tokens 100": (76_800, 102_400, 128_000, 160_000),
    "adapter --bottleneck 64": (2_379_264, 6_343_680, 11_893_248, 19_820_544),
    "adapter --bottleneck 64 --placement pfeiffer": (1_189_632, 3_171_840, 5_946_624, 9_910_272),
}


def configure(arguments: str) -> Config:
    """The configuration of `train.py --plan --mode ARGUMENTS`."""
    return config.parse(["--plan", "--device", "cpu", "--mode", *arguments.split()], "")[0]


@functools.cache
def on_meta(name: str) -> GPT:
    return weights.load_on_meta(name).model


def blank(shape: GPTConfig) -> GPT:
    with torch.device("meta"):
        return GPT(shape)


def predict(asked: Config, shape: GPTConfig, batch: list[Row] = BATCH) -> dict[str, Any]:
    model = blank(shape)
    apply_config(model, asked)
    return plan.predict(asked, model, batch)


@pytest.fixture(scope="module", autouse=True)
def one_thread_is_enough() -> Iterator[None]:
    with one_thread(predict=True):
        yield


@pytest.fixture
def make_run() -> Callable[[Config], tuple[GPT, torch.optim.Optimizer]]:
    def make(asked: Config) -> tuple[GPT, torch.optim.Optimizer]:
        model = GPT(SHAPE)
        model.init_weights(0)
        apply_config(model, asked)
        return model.train(), make_optimizer(model, 1e-3, 0.01)

    return make


@pytest.mark.parametrize("arguments", COUNTS)
def test_trainable_parameters_of_the_four_sizes(arguments: str) -> None:
    asked = configure(arguments)
    for name, count in zip(("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), COUNTS[arguments], strict=True):
        model = copy.deepcopy(on_meta(name))
        modes.apply(model, asked.mode, asked.mode_options)
        assert sum(p.numel() for p in modes.tuned_parameters(model).values()) == count


def test_gpt3_on_paper() -> None:
    # V d + 2,048 d + ...
    assert sum(p.numel() for p in on_meta("gpt3-175b").parameters()) == 174_604_259_328
    for rank, count in (1, 4_718_592), (4, 18_874_368), (8, 37_748_736):
        model = copy.deepcopy(on_meta("gpt3-175b"))
        modes.apply(model, "lora", configure(f"lora --rank {rank} --targets q,v").mode_options)
        assert sum(p.numel() for p in modes.tuned_parameters(model).values()) == count


def test_the_papers_one_matrix() -> None:
    layer = LoRALinear(Linear(64, 512, bias=False, device="meta"), 8, 1.0, 0.0, (0,), 512)
    assert layer.weight.numel() == 32_768 and layer.lora_A.numel() + layer.lora_B.numel() == 4_608
    assert 1 - 4_608 / 32_768 == pytest.approx(0.86, abs=0.005)
    assert "32,768" in modes.lora.Options.__dataclass_fields__["rank"].metadata["help"]


@pytest.mark.parametrize("arguments", [
    *(f"{mode} --dtype {dtype}" for mode in MODES for dtype in ("fp32", "bf16")),
    "full --dtype fp32 --accumulate 3",
    "adapter --dtype bf16 --accumulate 3 --model-dropout 0.1 --adapter-norms",
    "lora --dtype fp32 --model-dropout 0.1 --dropout 0.2 --targets q,v",
    "lora --dtype bf16 --dropout 0.2 --checkpoint",
    "selective --dtype fp32 --train embeddings,bias --checkpoint",
])  # fmt: skip
def test_a_real_step_holds_what_is_planned(arguments: str, make_run: Any) -> None:
    """Weights, gradients and optimizer state to the byte; the peak and the logits as a meter on the real
    tensors of a real second step finds them; trainable parameters and FLOPs too."""
    asked = configure(arguments)
    planned = predict(asked, SHAPE)
    meter = plan.MemoryMeter("cpu", SHAPE)
    with meter:
        model, optimizer = make_run(asked)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            meter.flops = 0
            train_step(model, [BATCH] * min(2, asked.train.accumulate), 1.0)
            optimizer.step()
    tuned = modes.tuned_parameters(model)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    assert planned["weights_bytes"] == sum(p.nbytes for p in model.parameters())
    assert planned["gradients_bytes"] == sum(p.grad.nbytes for p in tuned.values())
    assert planned["optimizer_bytes"] == sum(value.nbytes for value in state)
    assert planned["tuned_bytes"] == sum(p.nbytes for p in tuned.values())
    assert planned["trainable_parameters"] == sum(p.numel() for p in tuned.values())
    assert planned["logits_bytes"] == meter.logits == 64 * SHAPE.vocab_size * 4  # 15 + 23 + 2, padded
    tokens = sum(len(row.ids) - 1 for row in BATCH) * min(2, asked.train.accumulate)
    assert planned["flops_per_token"] == meter.flops / tokens
    assert planned["predicted_peak_bytes"] == pytest.approx(
        process_bytes(meter.peak, torch.device("cpu")), rel=0.01)


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_what_a_forward_pass_leaves(mode: str, make_run: Any) -> None:
    """Against autograd's own account of what it saves for the backward pass."""
    asked = configure(f"{mode} --dtype fp32")
    model, _ = make_run(asked)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(model.pack(BATCH))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) + loss.nbytes
    kept += sum(gradient.nbytes for gradient in loss.grad_fn.gradients if gradient is not None)
    assert predict(asked, SHAPE)["activations_bytes"] == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["full", "prompt"])
def test_flops_as_torch_counts_them(mode: str, dtype: str, make_run: Any) -> None:
    """Its counter knows neither attention's kernel for CPUs, which is turned off, nor oneDNN's linear
    layer."""
    known = {torch.ops.mkldnn._linear_pointwise:
             lambda x, weight, *_, out_shape, **__: 2 * math.prod(out_shape) * x[1]}
    asked = configure(f"{mode} --dtype {dtype}")
    model, _ = make_run(asked)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False, custom_mapping=known) as theirs:
            train_step(model, [BATCH], 1.0)
        with plan.MemoryMeter("cpu", SHAPE) as ours:
            train_step(model, [BATCH], 1.0)
    assert ours.flops == theirs.get_total_flops() > 0


def test_flops_of_attention_on_a_cpu() -> None:
    q, k, v = (torch.randn(2, 3, 7, 5, requires_grad=True) for _ in range(3))
    with plan.MemoryMeter("cpu", SHAPE) as meter:
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert meter.flops == 2 * 2 * (2 * 3 * 7 * 7 * 5)  # scores, and values
        y.sum().backward()
    assert meter.flops == 2 * 7 * (2 * 3 * 7 * 7 * 5)


def test_the_meter_follows_storages() -> None:
    with plan.MemoryMeter("cpu", GPTConfig(vocab_size=10, n_embd=7)) as meter:
        x = torch.zeros(100, 10)
        assert meter.live == meter.peak == meter.logits == 4000
        view = x[3:].T
        y = x + 1
        assert meter.live == 8000  # a view is not another tensor
        del x
        assert meter.live == 8000  # its view keeps it
        del view, y
        assert meter.live == 0 and meter.peak == 8000


def test_more_rows_cost_more_and_nothing_is_computed() -> None:
    """Activations grow with the rows; one block of GPT-3's takes more memory than a test has."""
    asked = configure("lora --dtype fp32")
    one, two = (predict(asked, SHAPE, BATCH * n) for n in (16, 32))  # as many: no rounding
    assert two["activations_bytes"] == pytest.approx(2 * one["activations_bytes"], rel=0.01)
    assert two["weights_bytes"] == one["weights_bytes"]
    block = replace(PRESETS["gpt3-175b"].config, n_layer=1)
    assert predict(configure("full --dtype fp32"), block)["predicted_peak_bytes"] > 39e9


def test_plan_of_a_folder_without_weights(tmp_path: Path) -> None:
    """Own process, no network, config.json only; every mode by default."""
    raw = {"model_type": "gpt2"} | asdict(SHAPE)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    ended = process("train.py", "--plan", "--model", "./base", "--batch", "3", "--max-new-tokens", "8", cwd=tmp_path,
                    HF_HUB_OFFLINE="1", HTTPS_PROXY="http://127.0.0.1:1")  # fmt: skip
    assert ended.code == 0, ended.err
    rows = [line.split("|")[1].strip() for line in ended.out.splitlines() if line.startswith("| ")]
    assert rows == ["mode", *MODES]
    # the soft prompt takes 20 of the 64 positions
    assert "3 rows with 132 tokens, of which 24 are targets (assumed" in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["base"]  # it wrote nothing


def test_a_plan_says_that_graphs_are_not_counted(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--plan", "--mode", "lora", "--model", model_folder, "--batch", "2", "--max-length", "80",
                 "--max-new-tokens", "8")
    monkeypatch.setattr(plan, "why_no_graphs", lambda *_: None)  # as with a GPU
    for graphs, says in (("off", False), ("auto", True)):
        ended = run_train(*arguments, "--graphs", graphs)
        assert ended.code == 0 and ("CUDA graphs is not counted" in ended.out) == says


def test_plan_reads_the_rows(model_folder: Path, tmp_path: Path) -> None:
    """With --data and a tokenizer the widest batch of the run is planned."""
    rows = [{"prompt": "lunch " * n, "completion": "late"} for n in (1, 2, 3, 30)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_train("--plan", "--mode", "full", "--model", model_folder, "--data", tmp_path, "--batch", "1",
                      "--split", "100,0,0")  # fmt: skip
    assert ended.code == 0, ended.err
    tokens = int(ended.out.split("1 rows with ")[1].split()[0])
    assert tokens > 30 and "the largest batch of" in ended.out


@pytest.mark.parametrize("arguments, says", [
    ("--model nosuch", "nosuch"),
    ("--model ./nosuch", "no such folder"),
    ("--model gpt2 --mode lora --rank 0", "rank"),
    ("--model gpt2 --mode prompt --prompt-init text", "belong together"),
])  # fmt: skip
def test_mistakes_are_one_line(arguments: str, says: str) -> None:
    ended = run_train("--plan", *arguments.split())
    assert ended.code == 2 and ended.out == ""
    assert says in ended.err and ended.err.count("\n") == 1


def test_gpt3_beside_the_paper() -> None:
    """Hu et al. 2021, section 4.2: full tuning of GPT-3 takes 1.2 TB of memory, and LoRA's file is 35 MB at
    rank 4 of query and value. Two blocks are planned in place of 96: the rest is the same arithmetic."""
    small, cost = replace(PRESETS["gpt3-175b"].config, n_layer=2), {}
    d, row = small.n_embd, [Row([0] * 64, ((52, 64),))]
    for arguments in ("full", "lora --rank 4 --targets q,v"):
        cost[arguments.split()[0]] = predict(configure(f"{arguments} --dtype fp32"), small, row)
    count = (small.vocab_size + 2048) * d + 2 * (12 * d * d + 13 * d) + 2 * d
    full, lora = cost["full"], cost["lora"]
    assert full["trainable_parameters"] == count and lora["trainable_parameters"] == 2 * 2 * 4 * 2 * d
    assert full["weights_bytes"] == full["gradients_bytes"] == full["tuned_bytes"] == 4 * count
    assert full["optimizer_bytes"] == pytest.approx(8 * count)
    assert lora["optimizer_bytes"] == pytest.approx(8 * lora["trainable_parameters"], rel=1e-3)
    # for all 96 blocks: the paper counts weights in 2 bytes; trained parameters in fp16 took 35 MB
    assert 48 * lora["trainable_parameters"] * 2 == pytest.approx(35e6, rel=0.1)
    whole = sum(p.numel() for p in on_meta("gpt3-175b").parameters())
    assert whole * 2 == pytest.approx(350e9, rel=0.01)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UserError, match="gpt5"):
        weights.load_on_meta("gpt5")
