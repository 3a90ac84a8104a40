"""Steps as CUDA graphs: the sizes and the input of a bucket, and a whole run with a stand-in for the graph, which calls
the recorded function at each replay; on a GPU the real ones."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import flash_stand_in
from scripts import QUICK, metrics, read_late, train, trained, write_pairs
from torch import Tensor, nn

from minift import graphs, modes
from minift.errors import UserError
from minift.files.hub import PRESETS
from minift.graphs import Bucket, StepGraph, StepGraphs, check_graphs, why_no_graphs
from minift.model.gpt import GPT
from minift.model.packing import HostBatch, Row
from minift.ops import attention, flash_attention
from minift.ops.cross_entropy import PADDING, cross_entropy
from minift.run.config import TrainOptions
from minift.training import StepResult, apply_step, make_optimizer, train_step

ROWS = [Row([*range(5, 45)], ((25, 40),)), Row([7] * 31, ((8, 31),)), Row([9] * 20, ((18, 20),))]
GPT2 = PRESETS["gpt2"].config
REPLAYS: list[int] = []


class Recorded:
    """In the place of torch.cuda.CUDAGraph: a replay computes with the tensors of the recording, and fills its
    result."""

    def __init__(self, compute: Callable[[], Tensor]):
        self.compute, self.numbers = compute, torch.full((2,), torch.nan)

    def replay(self) -> None:
        REPLAYS.append(id(self))
        self.numbers.copy_(self.compute())


def record(compute: Callable[[], Tensor], run: StepGraphs) -> tuple[Recorded, Tensor]:
    graph = Recorded(compute)
    return graph, graph.numbers


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and flash attention on a CPU, by their stand-ins."""
    read_late(monkeypatch)
    monkeypatch.setattr(graphs, "record", record)
    # a GPU's numbers are copied to the host at once; on a CPU the next replay would overwrite them before they are read
    monkeypatch.setattr(graphs, "StepResult", lambda numbers: StepResult(numbers.clone()))
    monkeypatch.setattr(graphs, "why_no_graphs", lambda options, config: None)
    monkeypatch.setattr(attention, "takes_flash", lambda qkv, n_head: True)
    monkeypatch.setattr(flash_attention, "flash_op", flash_stand_in)
    REPLAYS.clear()


def host_batch(lengths: list[int], targets: int = 3) -> HostBatch:
    return HostBatch([Row([1] * (length + 1), ((1, targets + 1),)) for length in lengths], 0)


def test_buckets_are_few_and_waste_little() -> None:
    buckets = {}
    for tokens in range(100, 4096, 7):
        batch = host_batch([tokens // 4] * 4, targets=tokens // 40 + 1)
        N, n, longest = buckets[tokens] = Bucket.of(batch)
        assert 0 <= N - len(batch.tokens) <= max(127, len(batch.tokens) / 8)
        assert len(batch.targets) <= n < max(65, 2 * len(batch.targets))
        assert longest >= max(*batch.seqlens, N - len(batch.tokens))
    assert len(set(buckets.values())) < 45
    assert Bucket.of(host_batch([170] * 8, targets=27)) == (1408, 256, 256)


def test_the_input_of_a_bucket(make_gpt: Callable[..., GPT]) -> None:
    """Filler tokens are a row, missing rows are empty, missing targets do not count."""
    model = make_gpt()
    run = StepGraphs(model, None, 1.0, [], most_rows=5)
    batch = HostBatch(ROWS, 0)
    graph = StepGraph(run, Bucket.of(batch))
    graph.fill(batch)
    N, n, longest = graph.bucket
    tokens, row_ids, positions, cu_seqlens, target_positions, targets, count = graph.input.split(graph.sizes)
    assert (N, n, longest) == (128, 64, 128) and len(tokens) == len(row_ids) == len(positions) == N
    assert cu_seqlens.tolist() == [0, 39, 69, 88, N, N, N]
    assert (tokens[88:] == 5).all() and not row_ids[88:].any() and not positions[88:].any()
    assert targets[:40].min() >= 0 and (targets[40:] == PADDING).all() and len(targets) == n and count.tolist() == [40]
    assert len(target_positions) == n and not target_positions[40:].any()


def test_targets_that_do_not_count() -> None:
    """Loss and gradients are those of the others; the NaN of a token that nothing wrote does not get through."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(31, 12, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([3, 30, PADDING, 0, PADDING, 7])
    hidden[4] = torch.nan
    hidden.requires_grad_()
    kept = [0, 1, 3, 5]
    wanted = nn.functional.cross_entropy(hidden[kept] @ weight.T, targets[kept], reduction="sum")
    expected = torch.autograd.grad(wanted, (hidden, weight))
    found = cross_entropy(hidden, weight, targets, has_padding=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, (hidden, weight)), expected)


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", model_folder, "--data", pairs, *QUICK, "--steps", 12, "--eval-every", 5]


@pytest.mark.usefixtures("quick", "on_cpu")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_has_the_losses_of_one_without_graphs(common: list[Any], tmp_path: Path, mode: str) -> None:
    for choice in ("off", "auto"):
        trained(*common, "--mode", mode, "--graphs", choice, "--out", tmp_path / choice)
        assert bool(REPLAYS) == (choice == "auto")
    assert len(REPLAYS) > len(set(REPLAYS))  # and one graph has several steps
    found, wanted = (metrics(tmp_path / name) for name in ("auto", "off"))
    assert len(found) == len(wanted)
    for line, expected in zip(found[1:], wanted[1:], strict=True):  # without the validation of the start
        assert line == pytest.approx(expected, rel=2e-3)


def tuned_model(make_gpt: Callable[..., GPT], dropout: float = 0.0) -> GPT:
    model = make_gpt()
    modes.apply(model, "lora", modes.MODES["lora"].Options(dropout=dropout))
    return model.train()


def make_run(model: GPT, **changes: Any) -> StepGraphs:
    tuned = modes.tuned_parameters(model).values()
    return StepGraphs(model, make_optimizer(model, 1e-2, 0.0), 1.0, tuned, **{"most_rows": 4} | changes)


@pytest.mark.usefixtures("on_cpu")
def test_each_replay_has_its_own_rows_rate_and_dropout(make_gpt: Callable[..., GPT]) -> None:
    run = make_run(tuned_model(make_gpt, dropout=0.5))
    losses = []
    for seed, lr, rows in ((0, 0.0, ROWS), (0, 0.0, ROWS), (1, 0.0, ROWS), (0, 0.0, ROWS[::-1]), (0, 1e-2, ROWS),
                           (0, 0.0, ROWS)):
        torch.manual_seed(seed)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        losses.append(run.step([rows]).read()[0])
        assert [group["lr"] for group in run.optimizer.param_groups] == [lr]
    first, same_seed, other_seed, other_rows, before_update, after_update = losses
    assert first == same_seed == before_update  # B is 0, so that dropout changes the gradient alone
    assert len(run.graphs) == 1 and len(REPLAYS) == 5 and after_update != before_update
    assert other_rows == pytest.approx(first, rel=1e-5)  # the same rows in another order


@pytest.mark.usefixtures("on_cpu")
def test_steps_without_a_graph(make_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones, and those of buckets beyond the most graphs. A bad step changes nothing."""
    run = make_run(tuned_model(make_gpt), most_tokens=128)
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    more = [Row([3] * 90, ((1, 80),))]
    for rows in (ROWS, ROWS, more, more, ROWS, ROWS * 4, ROWS * 4):
        loss, grad_norm = run.step([rows]).read()
        assert loss > 0 and grad_norm > 0
    assert list(run.graphs) == [Bucket(128, 64, 128)] and len(REPLAYS) == 2
    tuned = modes.tuned_parameters(run.model)
    run.model.h[0].attn.c_attn.lora_B.register_hook(lambda grad: grad * torch.nan)
    before = {name: p.detach().clone() for name, p in tuned.items()}
    assert math.isnan(run.step([ROWS]).read()[1])
    assert all(torch.equal(p, before[name]) for name, p in tuned.items())


def test_where_graphs_are_refused(monkeypatch: pytest.MonkeyPatch, common: list[Any], tmp_path: Path) -> None:
    ended = train(*common, "--graphs", "on", "--out", tmp_path / "x")
    assert ended.code == 2 and ended.err.count("\n") == 1 and not (tmp_path / "x").exists()
    assert "--graphs on: CUDA graphs need an NVIDIA GPU, and the device is cpu" in ended.err
    monkeypatch.setattr(graphs, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(graphs, "choose_dtype", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(graphs.torch, "empty", lambda *shape, dtype, device: None)
    monkeypatch.setattr(graphs, "takes_flash", lambda qkv, n_head: True)
    check_graphs(TrainOptions(graphs="on"), GPT2)
    for changes, reason in ({"accumulate": 2}, "--accumulate"), ({"checkpoint": True}, "--checkpoint"):
        check_graphs(TrainOptions(**changes), GPT2)  # auto runs without them
        with pytest.raises(UserError, match=f"--graphs on: .*{reason}"):
            check_graphs(TrainOptions(graphs="on", **changes), GPT2)
    monkeypatch.setattr(graphs, "WORLD_SIZE", 2)
    assert "one process" in why_no_graphs(TrainOptions(), GPT2)
    monkeypatch.setattr(graphs, "takes_flash", lambda qkv, n_head: False)
    assert "bf16" in why_no_graphs(TrainOptions(), GPT2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_on_a_gpu_steps_with_graphs_are_those_without(make_gpt: Callable[..., GPT], kernel: str) -> None:
    losses = {}
    for with_graphs in (False, True):
        model = make_gpt(n_embd=64, n_head=2)
        modes.apply(model, "lora", modes.MODES["lora"].Options())
        model.set_compute_dtype(torch.bfloat16)
        model.set_kernel(kernel)
        run = make_run(model.to("cuda").train())
        losses[with_graphs] = []
        for step in range(12):
            torch.manual_seed(step)
            rows = [Row([step + 1, *row.ids[1:]], row.spans) for row in ROWS]
            if with_graphs:
                result = run.step([rows])
            else:
                result = train_step(run.model, [rows], 1.0)
                apply_step(run.optimizer, result)
            losses[with_graphs].append(result.read()[0])
    assert losses[True] == pytest.approx(losses[False], rel=1e-2) and losses[True][-1] < losses[True][0]
