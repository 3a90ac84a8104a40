"""train.py as its users run it: every mode learns, and the loop does what the options say."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import (
    MODES,
    QUICK,
    evaluate,
    files,
    json_of,
    process,
    step_losses,
    tensors,
    train,
    trained,
    write_pairs,
)
from scripts import metrics as log_of

import train as script
from minift import modes
from minift.data import dataset as data
from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.errors import UserError
from minift.files import weights
from minift.files.checkpoint import Progress
from minift.model.gpt import GPT
from minift.model.packing import text_row
from minift.report import metrics, plot
from minift.report.findings import troubles
from minift.report.groups import Group
from minift.report.runs import Run
from minift.run import config as configuration
from minift.run.config import TrainOptions
from minift.training import iterate_steps, learning_rate, make_optimizer, train_step

RESULT = {
    "mode", "base", "steps", "trainable_parameters", "total_parameters", "train_loss", "best_val_loss",
    "test_loss", "test_perplexity", "rouge1", "rouge2", "rougeL", "tuned_bytes", "peak_memory_bytes",
    "tokens_per_second", "seconds", "learning_rate", "trainable_share", "best_step", "stopped_early",
}


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def common(model_folder: Path, pairs: Path) -> list[str]:
    return ["--model", str(model_folder), "--data", str(pairs), *QUICK]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, common: list[str], model_folder: Path) -> dict[str, Path]:
    """One run of each mode with its own defaults; the base's files are only read."""
    before = {name: (model_folder / name).read_bytes() for name in files(model_folder)}
    folder = tmp_path_factory.mktemp("runs")
    for mode in MODES:
        trained(*common, "--mode", mode, "--steps", 40, "--out", folder / mode)
    assert before == {name: (model_folder / name).read_bytes() for name in files(model_folder)}
    return {mode: folder / mode for mode in MODES}


def examples(pairs: Path, model_folder: Path, split: str = "train") -> list[Example]:
    base = weights.load(str(model_folder))
    options = data.DataOptions(str(pairs))
    found, *_ = data.load_examples(options, 0, base.tokenizer, base.eos_token_id, 96, {split: None})
    return found[split]


def trainable(model_folder: Path) -> GPT:
    """The base with all of its parameters to train."""
    model = weights.load(str(model_folder)).model
    model.requires_grad_(True)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_leaves_its_files(runs: dict[str, Path], model_folder: Path, mode: str) -> None:
    folder = runs[mode]
    assert set(files(folder)) == {
        "config.json", "metrics.jsonl", "tuned.safetensors", "last.safetensors", "result.json", "test_rows.jsonl",
        "lock",
    }
    losses, result = step_losses(folder), json_of(folder / "result.json")
    assert len(losses) == 40 and sum(losses[-8:]) < sum(losses[:8]) - 8 * 0.1
    assert RESULT <= result.keys()
    assert result["mode"] == mode and result["steps"] == 40 and result["base"] == str(model_folder)
    assert result["test_loss"] < result["base_test_loss"]
    assert result["test_perplexity"] == pytest.approx(math.exp(result["test_loss"]))
    validations = [line for line in log_of(folder) if "val_loss" in line]
    assert [line["step"] for line in validations] == list(range(0, 41, 4))
    assert result["best_val_loss"] == min(line["val_loss"] for line in validations)

    model = weights.load(str(model_folder)).model
    modes.apply(model, mode, modes.MODES[mode].Options())
    should_train = {name: p.shape for name, p in modes.tuned_parameters(model).items()}
    assert {name: t.shape for name, t in tensors(folder / "tuned.safetensors").items()} == should_train
    count = sum(shape.numel() for shape in should_train.values())
    assert result["trainable_parameters"] == count
    assert result["total_parameters"] == 31_704 and result["trainable_share"] == count / 31_704
    assert result["tuned_bytes"] == (folder / "tuned.safetensors").stat().st_size


@pytest.mark.parametrize("mode", MODES)
def test_eval_finds_the_scores_of_the_run(runs: dict[str, Path], mode: str) -> None:
    ended = evaluate(runs[mode], "--json", "--dtype", "fp32", "--device", "cpu", "--batch", 4, "--max-new-tokens", 6)
    scores, result = json.loads(ended.out), json_of(runs[mode] / "result.json")
    assert scores["tuned"]["loss"] == result["test_loss"] and scores["base"]["loss"] == result["base_test_loss"]
    for name in ("rouge1", "rouge2", "rougeL", "exact_match", "token_accuracy"):
        assert scores["tuned"][name] == result[name]


@pytest.mark.parametrize("mode_arg, order", [("lora,full", ["lora", "full"]), ("all", list(MODES))])
def test_several_modes_end_in_one_table(common: list[str], tmp_path: Path, mode_arg: str, order: list[str]) -> None:
    out = trained(*common, "--mode", mode_arg, "--steps", 3, "--out", tmp_path / "x", "--seed", 3)
    results = json_of(tmp_path / "x" / "compare.json")
    assert [result["mode"] for result in results] == order
    for result in results:
        assert json_of(tmp_path / "x" / result["mode"] / "result.json").items() <= result.items()
    assert len({result["base_test_loss"] for result in results}) == 1  # the same base on the same rows
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert [re.split(r" *\| *", line)[1] for line in table[: 1 + len(order)]] == ["mode", *order]
    for mode in order:  # each is a run of its own for eval.py, and what it would have been alone
        assert evaluate(tmp_path / "x" / mode, "--prompt", "1: lunch =", "--max-new-tokens", 2).code == 0
    trained(*common, "--mode", order[-1], "--steps", 3, "--out", tmp_path / "alone", "--seed", 3)
    if order[-1] != "prompt" and "prompt" not in order:  # a soft prompt leaves all modes fewer tokens of a row
        alone, one = (tensors(f / "tuned.safetensors") for f in (tmp_path / "alone", tmp_path / "x" / order[-1]))
        assert all(torch.equal(alone[name], one[name]) for name in one)


def test_a_mode_leaves_the_base_to_the_next_one_as_it_was(common: list[str], tmp_path: Path) -> None:
    """The base is loaded once; full tuning trains its parameters, and must do so on a copy."""
    trained(*common, "--mode", "full,lora", "--steps", 3, "--out", tmp_path / "x")
    trained(*common, "--mode", "lora", "--steps", 3, "--out", tmp_path / "alone")
    alone, second = (tensors(f / "tuned.safetensors") for f in (tmp_path / "alone", tmp_path / "x" / "lora"))
    assert all(torch.equal(alone[name], second[name]) for name in alone)
    results = [json_of(folder / "result.json") for folder in (tmp_path / "alone", tmp_path / "x" / "full")]
    assert results[0]["base_test_loss"] == results[1]["base_test_loss"]


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_accumulating_is_the_same_step(common: list[str], tmp_path: Path, mode: str) -> None:
    """8 rows at once and 8 times one: ragged rows weigh by their target tokens, not by their batch."""
    arguments = [*common, "--mode", mode, "--steps", 5, "--order", "file", "--lr", "1e-3"]
    for batch, times in ((8, 1), (1, 8), (3, 3)):
        rows = ["--batch", batch, "--accumulate", times, "--out", tmp_path / f"{batch}"]
        assert train(*arguments, *rows).code == 0
    assert step_losses(tmp_path / "1") == pytest.approx(step_losses(tmp_path / "8"), abs=2e-6)
    assert step_losses(tmp_path / "3")[0] != pytest.approx(step_losses(tmp_path / "8")[0], abs=1e-4)  # 9 rows
    one, eight = (tensors(tmp_path / batch / "last.safetensors") for batch in ("1", "8"))
    for name in one:
        if not name.startswith("tuned."):
            continue
        a, b = one[name].float(), eight[name].float()
        if name.endswith("c_attn.bias"):  # softmax ignores a key's bias: its gradient is rounding noise alone
            a, b = (torch.cat([t[:24], t[48:]]) for t in (a, b))
        torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-3)


def test_loss_is_that_of_completions_and_their_end(model_folder: Path, pairs: Path) -> None:
    model = trainable(model_folder)
    rows = examples(pairs, model_folder)[:5]
    expected = count = 0.0
    for row in rows:
        batch = model.pack([text_row(row.ids)])
        logits = model.logits(model.hidden(batch, batch.target_positions))  # of every token but the last
        prompt = len(row.prompt)
        expected += F.cross_entropy(logits[prompt - 1 :], torch.tensor(row.ids[prompt:]), reduction="sum")
        count += len(row.ids) - prompt
        assert row.ids[-1] == model.config.eos_token_id and row.ids.count(row.ids[-1]) == 1
    loss, _ = train_step(model, [rows[:2], rows[2:]], 0.0).read()
    assert loss == pytest.approx(expected.item() / count, rel=1e-6)


def test_clip_bounds_the_norm_of_the_whole_gradient(model_folder: Path, pairs: Path) -> None:
    rows, norms = examples(pairs, model_folder)[:4], {}
    for clip in (0.0, 0.5, 1e6):
        model = trainable(model_folder)
        _, before = train_step(model, [rows], clip).read()
        after = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
        norms[clip] = (before, after)
    assert norms[0.0] == norms[1e6] and norms[0.0][0] > 1
    assert norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-4)
    assert norms[0.5][0] == norms[0.0][0] and norms[0.5][1] == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule_is_its_formula(common: list[str], tmp_path: Path, schedule: str) -> None:
    options = f"--mode prompt --steps 20 --lr 0.01 --warmup-ratio 0.2 --schedule {schedule} --patience 0"
    trained(*common, *options.split(), "--out", tmp_path / "x")
    found = [line["lr"] for line in log_of(tmp_path / "x") if "lr" in line]
    warm = [0.01 * step / 4 for step in (1, 2, 3, 4)]
    done = [step / 16 for step in range(16)]
    cosine = [0.01 * math.cos(math.pi * d / 2) ** 2 for d in done]
    rest = {"cosine": cosine, "linear": [0.01 * (1 - d) for d in done], "constant": [0.01] * 16}[schedule]
    assert found == pytest.approx(warm + rest, rel=1e-9)


def test_warm_up_of_nothing_and_of_everything() -> None:
    options = TrainOptions(lr=1.0, schedule="linear", warmup_ratio=0.0)
    assert learning_rate(0, 10, options) == 1.0
    options = TrainOptions(lr=1.0, schedule="cosine", warmup_ratio=1.0)
    assert [learning_rate(step, 4, options) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(0, 1, TrainOptions(lr=1.0, schedule="cosine", warmup_ratio=0.06)) == 1.0


@pytest.mark.parametrize("mode", MODES)
def test_biases_norms_and_prompt_do_not_decay(model_folder: Path, mode: str) -> None:
    model = weights.load(str(model_folder)).model
    options = {"adapter": {"adapter_norms": True}, "selective": {"train": "top:1+bias,mlp"}}.get(mode, {})
    modes.apply(model, mode, modes.MODES[mode].Options(**options))
    optimizer = make_optimizer(model, 0.25, 0.125)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tuned = modes.tuned_parameters(model)
    assert len(decay) == len(tuned) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in tuned.items():
        spared = name.endswith("bias") or "ln_" in name or name == "prompt.weight"
        assert decay[parameter] == (0.0 if spared else 0.125), name
    assert all(group["lr"] == 0.25 for group in optimizer.param_groups)


def test_overfitting_stops_early_with_the_best_weights(
    common: list[str], tmp_path: Path, model_folder: Path
) -> None:
    pairs = write_pairs(tmp_path / "few", rows=3, seed=1)
    options = "--mode full --lr 3e-3 --steps 300 --eval-every 5 --patience 2 --schedule constant --batch 3"
    out = trained(*common, *options.split(), "--data", pairs, "--out", tmp_path / "x")
    result, log = json_of(tmp_path / "x" / "result.json"), log_of(tmp_path / "x")
    validations = [line for line in log if "val_loss" in line]
    assert result["stopped_early"] and result["steps"] < 300 and "stopped early" in out
    assert result["steps"] == validations[-1]["step"] == result["best_step"] + 2 * 5
    losses = [line["val_loss"] for line in validations]
    assert losses[-3] == min(losses) == result["best_val_loss"] < losses[-1]  # validation turned up
    assert validations[-1]["train_loss"] < validations[-3]["train_loss"]  # while training went on down
    best, last = (tensors(tmp_path / "x" / name) for name in ("tuned.safetensors", "last.safetensors"))
    assert any(not torch.equal(best[name], last[f"tuned.{name}"]) for name in best)
    base = weights.load(str(model_folder))
    model = base.model.shared_copy()
    modes.apply(model, "full", modes.MODES["full"].Options())
    modes.load_tuned(model, best, "")
    for split, loss in (("val", result["best_val_loss"]), ("test", result["test_loss"])):
        rows = examples(pairs, model_folder, split)
        assert metrics.score(model, base.tokenizer, base.eos_token_id, rows, 3, 1, None)["loss"] == loss


def test_a_tuned_model_ends_its_text(common: list[str], tmp_path: Path, model_folder: Path) -> None:
    """Memorised rows come back exactly, and generation ends with them, before its limit."""
    rows = [("Say lunch:", "lunch"), ("Say it late:", "late"), ("Say a meeting is:", "a meeting")]
    for split in ("train", "val", "test"):
        text = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
        (tmp_path / "copy").mkdir(exist_ok=True)
        (tmp_path / "copy" / f"{split}.jsonl").write_text(text)
    options = "--mode full --lr 1e-2 --steps 120 --batch 3 --patience 0 --max-new-tokens 30"
    out = trained(*common, *options.split(), "--data", tmp_path / "copy", "--out", tmp_path / "x")
    result = json_of(tmp_path / "x" / "result.json")
    assert result["exact_match"] == 1.0 and result["rougeL"] == 1.0 and result["test_loss"] < 0.1
    assert "3 of its 3 different prompts are also in train" in out
    for prompt, completion in rows:
        ended = evaluate(tmp_path / "x", "--prompt", prompt, "--max-new-tokens", 40, "--dtype", "fp32")
        assert ended.out == f" {completion}\n"


@pytest.mark.parametrize("mode, dropout", [("lora", "--dropout"), ("full", "--model-dropout")])
def test_seed_decides_everything(common: list[str], tmp_path: Path, mode: str, dropout: str) -> None:
    found = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # whatever was drawn before
        arguments = ["--mode", mode, "--steps", 6, dropout, 0.2, "--seed", seed]
        trained(*common, *arguments, "--out", tmp_path / f"{number}")
        found.append(tensors(tmp_path / f"{number}" / "last.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert step_losses(tmp_path / "0") == step_losses(tmp_path / "1") != step_losses(tmp_path / "2")
    assert not any(torch.equal(t, found[2][name]) for name, t in found[0].items()
                   if name.startswith("tuned.") and not name.endswith("bias"))


def test_epochs_count_whole_passes(common: list[str], tmp_path: Path, model_folder: Path, pairs: Path) -> None:
    """24 rows in 2 batches of 5 a step: 3 steps an epoch, the last one of 4 rows; every row once an epoch."""
    trained(*common, "--mode", "prompt", "--epochs", 2, "--batch", 5, "--accumulate", 2, "--out", tmp_path / "x")
    assert len(step_losses(tmp_path / "x")) == 6
    rows = examples(pairs, model_folder)
    options = TrainOptions(batch=5, accumulate=2)
    steps = iterate_steps(rows, options, 0)
    epochs = [[next(steps) for _ in range(3)] for _ in range(3)]
    for epoch in epochs:
        assert [len(step) for step in epoch] == [2, 2, 1]
        found = [row.pair.where for step in epoch for batch in step for row in batch]
        assert sorted(found) == sorted(row.pair.where for row in rows)
    assert epochs[0] != epochs[1]
    resumed = iterate_steps(rows, options, 4)
    assert [next(resumed) for _ in range(5)] == epochs[1][1:] + epochs[2]


def test_help_loads_neither_model_nor_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError

    for module, name in ((weights, "load"), (weights, "load_on_meta"), (data, "load_examples"), (data, "read_text")):
        monkeypatch.setattr(module, name, refuse)
    ended = train("--help", "--model", "./nowhere", "--out", tmp_path / "x")
    assert ended.code == 0 and not ended.err and not list(tmp_path.iterdir())
    for flag in "--mode --rank --train --prompt-tokens --bottleneck --template --resume --seed".split():
        assert flag in ended.out
    for mode in MODES:
        assert f"mode {mode}" in ended.out or mode == "full"
    process_ended = process("train.py", "--help", cwd=tmp_path)
    assert process_ended.code == 0 and "usage: train.py" in process_ended.out


def test_configuration_is_printed_with_its_origins(common: list[str], tmp_path: Path) -> None:
    arguments = ["--mode", "lora", "--steps", 2, "--rank", 3, "--out", tmp_path / "x"]
    out = trained(*common, *arguments)
    assert "  rank = 3  (command line)\n" in out and f"  lr = {modes.MODES['lora'].lr}  (lora's default)\n" in out
    by_default = next(line for line in out.splitlines() if line.startswith("  by default: "))
    assert "alpha 16.0" in by_default and "seed 0" in by_default and "rank" not in by_default
    origins = json_of(tmp_path / "x" / "config.json")["origins"]
    assert origins["rank"] == [3, "command line"] and origins["alpha"] == [16.0, "default"]
    assert origins["weight_decay"] == [0.0, "lora's default"]


def test_without_out_runs_are_numbered(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(*common, "--steps", 1)
    ended = process("train.py", *common, "--steps", 2, cwd=tmp_path)
    assert ended.code == 0 and ended.err == ""
    assert "lora step 2/2  train" in ended.out and "\r" not in ended.out  # plain lines: stdout is no terminal
    for number in (1, 2):
        assert json_of(tmp_path / "runs" / f"lora-{number}" / "result.json")["steps"] == number


def test_general_text_gives_forgetting(common: list[str], tmp_path: Path, texts: tuple[str, ...]) -> None:
    (tmp_path / "general.txt").write_text("\n".join(texts), encoding="utf-8")
    options = ["--mode", "lora", "--steps", 6, "--general", tmp_path / "general.txt"]
    trained(*common, *options, "--out", tmp_path / "x")
    result = json_of(tmp_path / "x" / "result.json")
    ended = evaluate(tmp_path / "x", "--json", "--batch", 4, "--max-new-tokens", 6, "--dtype", "fp32")
    scores = json.loads(ended.out)
    change = scores["tuned"]["general_loss"] - scores["base"]["general_loss"]
    assert result["forgetting"] == pytest.approx(change, abs=1e-6) and change != 0


def test_a_mode_that_trains_nothing_is_an_error(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = replace(modes.MODES["full"], apply=lambda model, options: None)
    monkeypatch.setitem(modes.MODES, "full", record)
    ended = train(*common, "--mode", "full", "--steps", 2, "--out", tmp_path / "x")
    assert ended.code == 2 and "nothing to train" in ended.err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("mode", ["full", "prompt"])
def test_tuned_parameters_that_equal_their_initial_values_are_an_error(
    common: list[str], tmp_path: Path, mode: str
) -> None:
    options = ["--mode", mode, "--steps", 2, "--lr", 1e-30, "--weight-decay", 0]
    ended = train(*common, *options, "--out", tmp_path / "x")
    assert ended.code == 2 and "equal their initial values" in ended.err and "--lr" in ended.err
    assert not (tmp_path / "x" / "result.json").exists()


def test_micro_batches_add_up_to_the_gradient_of_one_batch(make_gpt: Callable) -> None:
    """The loop relies on it: gradients are gone before the next step's, and add up within one."""
    model = make_gpt()
    rows = [example([1, 2, 3, 96], 2, "x:1"), example([4, 5, 96], 1, "x:2")]
    first, _ = train_step(model, [rows], 0.0).read()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    again, _ = train_step(model, [rows[:1], rows[1:]], 0.0).read()
    assert again == pytest.approx(first, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-6, rtol=1e-4)


def example(ids: list[int], prompt: int, where: str) -> Example:
    return Example(ids, ((prompt, len(ids)),), Pair("a", "b", where))


def test_steps_that_are_not_finite_are_refused_by_name(make_gpt: Callable, tmp_path: Path) -> None:
    model = make_gpt()
    rows = [[example([1, 2, 96], 1, "train.jsonl:7")]]
    model.h[1].mlp.c_fc.weight.register_hook(lambda grad: torch.full_like(grad, math.inf))
    error = script.bad_step(model, math.nan, rows, 1, tmp_path, 0, None)
    assert isinstance(error, UserError)
    assert re.search(r"step 1: .*h\.1\.mlp\.c_fc\.weight.*train\.jsonl:7", str(error))


def usual_losses(folder: Path, pairs: Path, mode: str, steps: int, batch_rows: int, lr: float) -> list[float]:
    """The losses of transformers' model: rows padded to the longest of a batch, labels masked on prompt and
    padding, torch's AdamW, clipping at 1."""
    from transformers import GPT2LMHeadModel

    none = dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **none).train()
    if mode == "selective":
        model.requires_grad_(False)
        for module in (*model.transformer.h[-2:], model.transformer.ln_f):
            module.requires_grad_(True)
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=lr, weight_decay=0.0)
    rows, losses = examples(pairs, folder), []
    batches = [rows[start : start + batch_rows] for start in range(0, len(rows), batch_rows)]
    for step in range(steps):
        batch = batches[step % len(batches)]
        size = len(batch), max(len(row.ids) for row in batch)
        ids, mask, labels = torch.zeros(size).long(), torch.zeros(size).long(), torch.full(size, -100)
        for i, row in enumerate(batch):
            n = len(row.ids)
            ids[i, :n], mask[i, :n] = torch.tensor(row.ids), 1
            labels[i, len(row.prompt) : n] = ids[i, len(row.prompt) : n]
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_twenty_steps_have_the_losses_of_transformers(
    common: list[str], model_folder: Path, pairs: Path, tmp_path: Path, mode: str
) -> None:
    train = ["--train", "top:2,final"] if mode == "selective" else []
    trained(*common, "--mode", mode, *train, "--steps", 20, "--order", "file", "--batch", 4, "--lr", 1e-3,
            "--weight-decay", 0, "--schedule", "constant", "--warmup-ratio", 0, "--eval-every", 1000,
            "--dtype", "fp32", "--out", tmp_path / "x")
    found, expected = step_losses(tmp_path / "x"), usual_losses(model_folder, pairs, mode, 20, 4, 1e-3)
    assert len(found) == 20 and found == pytest.approx(expected, abs=1e-3)
    assert max(expected) - min(expected) > 0.1  # steps that change nothing would agree too


def validations(folder: Path) -> dict[int, float]:
    """The validation loss by step."""
    return {line["step"]: line["val_loss"] for line in log_of(folder) if "val_loss" in line}


def test_the_start_is_scored_and_kept_when_nothing_beats_it(
    runs: dict[str, Path], common: list[str], tmp_path: Path
) -> None:
    """From a tuned adapter, with a learning rate that only does harm. The base itself is such a start too."""
    again = [*common, "--steps", 3, "--eval-every", 1, "--lr", 3, "--warmup-ratio", 0]
    out = trained(*again, "--adapter", runs["lora"], "--out", tmp_path / "x")
    first, second = (json_of(folder / "result.json") for folder in (runs["lora"], tmp_path / "x"))
    found = validations(tmp_path / "x")
    assert found.pop(0) == second["best_val_loss"] == first["best_val_loss"] < min(found.values())
    assert second["best_step"] == 0 and second["steps"] == 3 and second["test_loss"] == first["test_loss"]
    best = [tensors(folder / "tuned.safetensors") for folder in (runs["lora"], tmp_path / "x")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert "lora did not beat its start" in out

    sentences = [finding.sentence for finding in troubles(Run("lora", second), Group([], {}))]
    assert any("lora did not beat its start" in sentence for sentence in sentences)

    # the base is a start too; here it is one that knows the pairs already
    assert evaluate(runs["full"], "--save", tmp_path / "base").code == 0
    trained(*again, "--model", tmp_path / "base", "--mode", "full", "--out", tmp_path / "y")
    result = json_of(tmp_path / "y" / "result.json")
    assert result["best_step"] == 0 and result["test_loss"] == result["base_test_loss"]


def test_step_0_has_the_loss_of_the_base(runs: dict[str, Path], model_folder: Path, pairs: Path) -> None:
    base = weights.load(str(model_folder)).model
    expected = metrics.measure_losses(base, examples(pairs, model_folder, "val")[:6], 4)["loss"]
    for mode in ("full", "lora", "adapter"):
        assert validations(runs[mode])[0] == pytest.approx(expected, rel=1e-6)


def test_scoring_the_start_changes_no_step(common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*common, "--steps", 4, "--dropout", 0.3, "--model-dropout", 0.2, "--mode", "lora"]
    trained(*arguments, "--out", tmp_path / "x")
    validate = script.validate
    monkeypatch.setattr(script, "validate", lambda *a: validate(*a) if a[-1].step else None)
    trained(*arguments, "--out", tmp_path / "without")
    assert step_losses(tmp_path / "x") == step_losses(tmp_path / "without")


def test_early_stopping_does_not_count_the_start(
    make_gpt: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worse than the start but better each time: a run may beat it when the learning rate has come down."""
    losses = iter([1.0, 2.0, 1.9, 1.8, 1.85, 1.8])
    monkeypatch.setattr(metrics, "measure_losses", lambda *_: {"loss": next(losses)})
    [config] = configuration.parse(["--patience", "2"], "")
    model, progress = make_gpt().requires_grad_(True), Progress()
    for step, stopped in enumerate([False, False, False, False, False, True]):
        progress.step = step
        script.validate(model, [example([1, 96], 1, "x:1")], config, tmp_path, {}, progress)
        assert progress.early_stopped == stopped and progress.best_step == 0 and progress.best_val_loss == 1.0


def test_the_length_limit_follows_the_references(tmp_path: Path, common: list[str], model_folder: Path) -> None:
    at = common.index("--max-new-tokens")
    arguments = [*common[:at], *common[at + 2 :], "--mode", "prompt", "--steps", 1]
    out = trained(*arguments, "--out", tmp_path / "x")
    pairs = Path(common[common.index("--data") + 1])
    longest = max(len(row.ids) - 1 - len(row.prompt) for row in examples(pairs, model_folder, "val")[:6])
    assert f"max_new_tokens = {longest + 1}  (the longest validation reference has {longest} tokens" in out
    config = json_of(tmp_path / "x" / "config.json")
    assert config["train"]["max_new_tokens"] == longest + 1
    ended = evaluate(tmp_path / "x", "--json", "--batch", 4, "--dtype", "fp32", "--test-rows", 6)
    result = json_of(tmp_path / "x" / "result.json")
    scores = json.loads(ended.out)["tuned"]
    assert scores["completions_at_limit"] == result["completions_at_limit"]
    assert scores["rougeL"] == result["rougeL"]

    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "lunch late " * 7}) + "\n"
                            for i in range(12)))
    out = trained(*arguments, "--data", long, "--out", tmp_path / "y")
    room = 96 - modes.MODES["prompt"].Options().prompt_tokens
    assert f"max_new_tokens = {room // 2}  (half of the model's positions; the longest validation reference" in out


def test_without_validation_and_test_rows(common: list[str], tmp_path: Path) -> None:
    two = tmp_path / "two.jsonl"
    two.write_text('{"prompt": "a late", "completion": "lunch"}\n{"prompt": "a cheap", "completion": "meeting"}\n')
    general = tmp_path / "general.txt"
    general.write_text("The fridge is broken again. Can you call the landlord, please?")
    arguments = [*common, "--data", two, "--split", "100,0,0", "--steps", 5, "--patience", 1, "--general", general]
    out = trained(*arguments, "--mode", "lora,full", "--out", tmp_path / "x")
    assert "no validation loss, no early stopping" in out and "no scores but forgetting and cost" in out
    for mode in ("lora", "full"):
        folder = tmp_path / "x" / mode
        result = json_of(folder / "result.json")
        assert result["steps"] == result["best_step"] == 5 and not result["stopped_early"]
        for name in ("best_val_loss", "test_loss", "test_perplexity", "base_test_loss", "rougeL", "exact_match"):
            assert result[name] is None, name
        assert result["forgetting"] != 0 and result["tuned_bytes"] > 0
        best, last = (tensors(folder / name) for name in ("tuned.safetensors", "last.safetensors"))
        assert all(torch.equal(best[name], last[f"tuned.{name}"]) for name in best)
        assert evaluate(folder, "--prompt", "a late", "--max-new-tokens", 2).code == 0
    ended = evaluate("--compare", tmp_path / "x")
    assert ended.code == 0 and "| full" in ended.out and "not ranked: there are no test rows" in ended.out
    trained(*arguments, "--split", "50,50,0", "--mode", "lora", "--out", tmp_path / "y")
    result = json_of(tmp_path / "y" / "result.json")
    assert result["best_val_loss"] > 0 and result["test_loss"] is None


def test_a_base_without_an_end_of_text(model_folder: Path, common: list[str], tmp_path: Path) -> None:
    """It is missed only where a row has to end, and --eos names it."""
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    (base / "generation_config.json").unlink(missing_ok=True)
    config = json_of(base / "config.json") | {"eos_token_id": 50256, "bos_token_id": 50256}
    (base / "config.json").write_text(json.dumps(config))
    vocabulary = json_of(base / "vocab.json")
    vocabulary["<the end>"] = vocabulary.pop("<|endoftext|>")
    (base / "vocab.json").write_text(json.dumps(vocabulary))
    assert weights.load(str(base)).eos_token_id is None

    arguments = [*common, "--model", base, "--mode", "lora", "--steps", 2]
    ended = train(*arguments, "--out", tmp_path / "x")
    assert ended.code == 2 and "give --eos TOKEN" in ended.err and str(base) in ended.err
    for wrong in ("<nothing>", "320"):
        ended = train(*arguments, "--eos", wrong, "--out", tmp_path / "x")
        assert ended.code == 2 and f"--eos '{wrong}'" in ended.err and ended.err.count("\n") == 1
    assert not (tmp_path / "x").exists()
    for folder, token in (("text", "<the end>"), ("number", "0")):
        trained(*arguments, "--eos", token, "--out", tmp_path / folder)
        ended = evaluate(tmp_path / folder, "--json", "--dtype", "fp32", "--batch", 4)
        assert json.loads(ended.out)["tuned"]["loss"] == json_of(tmp_path / folder / "result.json")["test_loss"]
    trained(*common, "--mode", "lora", "--steps", 2, "--out", tmp_path / "usual")
    assert step_losses(tmp_path / "text") == step_losses(tmp_path / "number") == step_losses(tmp_path / "usual")


def test_curves_are_drawn_where_matplotlib_is(
    common: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(plot, "draw_curves", lambda folder: drawn.append(len(log_of(folder))))
    trained(*common, "--mode", "prompt", "--steps", 3, "--eval-every", 1, "--out", tmp_path / "x")
    assert drawn == [7]  # once, at the end of a run this short
    monkeypatch.setattr(plot, "FIRST_PICTURE", 0.0)
    trained(*common, "--mode", "prompt", "--steps", 3, "--eval-every", 1, "--out", tmp_path / "y")
    assert drawn[1] == 3 and drawn[-1] == 7  # after the first validation, and at the end

    def missing(folder: Path) -> None:
        drawn.append(0)
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr(plot, "draw_curves", missing)
    drawn.clear()
    trained(*common, "--mode", "prompt", "--steps", 3, "--eval-every", 1, "--out", tmp_path / "z")
    assert drawn == [0]  # not tried again


def test_curves_png_is_in_the_folder(common: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ended = process("train.py", *common, "--mode", "prompt", "--steps", 2, "--out", tmp_path / "x", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert (tmp_path / "x" / "curves.png").read_bytes().startswith(b"\x89PNG")
