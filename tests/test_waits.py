"""A step makes a GPU wait for nothing: one copy of its rows to the device, one reading of its loss and norm, late."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import QUICK, assert_same_tensors, interrupt, json_of, metrics, read_late, train, trained, write_pairs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minift import modes, training
from minift.model.gpt import GPT
from minift.model.packing import Row
from minift.training import apply_step, make_optimizer, train_step

ROWS = [Row([5] * 40, ((25, 40),)), Row([7] * 31, ((8, 31),)), Row([9] * 20, ((18, 20),))]
aten = torch.ops.aten


class Copies(TorchDispatchMode):
    """The sizes of copies from one device to another, and the operations that read a value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and result.device != args[0].device:
            self.copies.append(args[0].numel())
        if func is aten.copy_.default and args[0].device != args[1].device:
            self.copies.append(args[1].numel())
        if func in (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default):
            self.reads.append(str(func))
        return result


def tuned_model(make_gpt: Callable[..., GPT], mode: str) -> GPT:
    model = make_gpt()
    options = {"lora": {"dropout": 0.1}}.get(mode, {})
    modes.apply(model, mode, modes.MODES[mode].Options(**options))
    model.dropout = 0.1
    return model.train()


@pytest.mark.parametrize("mode", ["full", "lora", "prompt"])
def test_a_step_reads_nothing_and_copies_its_rows_once(make_gpt: Callable[..., GPT], mode: str) -> None:
    """On the meta device every reading of a value is an error, as it is a wait on a GPU."""
    model = tuned_model(make_gpt, mode).to("meta")
    for micro_batches in ([ROWS], [ROWS, ROWS[:2]]):
        with Copies() as seen:
            result = train_step(model, micro_batches, 1.0)
        assert len(seen.copies) == len(micro_batches) and not seen.reads
        assert all(p.grad is not None for p in modes.tuned_parameters(model).values())
        with pytest.raises(RuntimeError, match="meta"):
            result.read()


def test_the_loss_and_the_norm_are_read_together(make_gpt: Callable[..., GPT], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "reads_late", lambda device: True)
    model, read = tuned_model(make_gpt, "lora"), []
    optimizer = make_optimizer(model, 1e-2, 0.0)
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, name)

        def counting(self: Tensor, original: Any = original, name: str = name) -> Any:
            read.append(name)
            return original(self)

        monkeypatch.setattr(Tensor, name, counting)
    with Copies() as seen:
        result = train_step(model, [ROWS, ROWS[:2]], 1.0)
        apply_step(optimizer, result)
        assert not read and not seen.reads
        loss, grad_norm = result.read()
    assert read == ["tolist"] and not seen.reads and loss > 0 and grad_norm > 0


def test_a_bad_step_and_those_after_it_change_nothing(make_gpt: Callable[..., GPT],
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the device decides, or the host."""
    for late in (False, True):
        monkeypatch.setattr(training, "reads_late", lambda device, late=late: late)
        model = tuned_model(make_gpt, "lora")
        tuned = modes.tuned_parameters(model)
        optimizer = make_optimizer(model, 1e-2, 0.1)
        states = []
        for bad in (False, False, True, False):
            handle = model.h[0].attn.c_attn.lora_B.register_hook(lambda g, bad=bad: g * torch.nan if bad else g)
            apply_step(optimizer, train_step(model, [ROWS], 1.0))
            handle.remove()
            states.append([p.detach().clone() for p in tuned.values()])
            assert all(p.grad is None for p in tuned.values())
        same = [all(map(torch.equal, a, b)) for a, b in zip(states, states[1:], strict=False)]
        assert same == [False, True, late]
        assert {int(s["step"]) for s in optimizer.state.values()} == ({2} if late else {3})


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_the_device_finds_every_number_that_is_not_finite(number: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    optimizer.found_inf = torch.zeros(())
    for numbers, moves in (([-3e38, 2.0], True), ([number, 2.0], False), ([2.0, number], False), ([1.0, 2.0], False)):
        before, parameter.grad = parameter.detach().clone(), torch.ones(3)
        training.guarded_step(optimizer, torch.tensor(numbers))
        assert torch.equal(parameter, before) != moves


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", model_folder, "--data", pairs, *QUICK, "--mode", "lora", "--steps", 7, "--eval-every", 3,
            "--dropout", 0.1, "--model-dropout", 0.1, "--accumulate", 2]


@pytest.mark.usefixtures("quick")
def test_reading_late_changes_no_number(common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, norms, validations and files, also after an interruption, which then ends one step later."""
    trained(*common, "--out", tmp_path / "at once")
    read_late(monkeypatch)
    trained(*common, "--out", tmp_path / "late")
    interrupt(monkeypatch, steps=(4,))
    ended = train(*common, "--out", tmp_path / "halves")
    assert ended.code == 128 + signal.SIGTERM and "stopped after step 5" in ended.out
    trained("--resume", tmp_path / "halves")
    for name in ("late", "halves"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "at once")
        assert_same_tensors(tmp_path / name, tmp_path / "at once")
        assert json_of(tmp_path / name / "result.json")["tokens_per_second"] > 0
