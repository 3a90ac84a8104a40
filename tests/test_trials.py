"""Searches (--lr 1e-3,1e-2, --lr auto, --rank 2,4) and repetitions (--seeds) of train.py."""

import itertools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from scripts import (
    QUICK,
    assert_same_run,
    evaluate,
    files,
    interrupt,
    json_of,
    metrics,
    scores,
    step_losses,
    tensors,
    train,
    trained,
    write_pairs,
)

from minift import modes, plan, trials
from minift.errors import TrainingFailed
from minift.files.checkpoint import Progress
from minift.progress import is_behind
from minift.report import metrics as report_metrics
from minift.report.display import Display
from minift.report.result import steady_speed
from minift.run import config as configuration
from minift.run.config import Config
from minift.trials import FURTHER, Trials, average, repetitions

STEPS = 6

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", model_folder, "--data", pairs, *QUICK, "--steps", STEPS, "--eval-every", 2,
            "--model-dropout", 0.1, "--mode", "lora"]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of trials.jsonl without times."""
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


# ---- the choice

def test_the_best_validation_loss_is_kept_and_scored_once(
    common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rate alone says which one is the best: the search ends in the same run, bit for bit."""
    rates = (1e-4, 2e-2, 1e-3)
    common = [*common, "--patience", 0]  # no trial stops
    for rate in rates:
        trained(*common, "--lr", rate, "--out", tmp_path / str(rate))
    losses = [json_of(tmp_path / str(rate) / "result.json")["best_val_loss"] for rate in rates]
    best = rates[losses.index(min(losses))]
    scored = []
    score = report_metrics.score
    monkeypatch.setattr(report_metrics, "score", lambda *a: scored.append(a[0]) or score(*a))
    out = trained(*common, "--lr", "1e-4,2e-2,1e-3", "--out", tmp_path / "x")
    assert len(scored) == 2  # the chosen run and the base: no trial has seen the test rows
    assert_same_run(tmp_path / str(best), tmp_path / "x")

    lines = trials_of(tmp_path / "x")
    assert [line["options"] for line in lines] == [{"lr": rate} for rate in rates]
    assert [line["val_loss"] for line in lines] == losses
    assert [line["chosen"] for line in lines] == [rate == best for rate in rates]
    assert {(line["mode"], line["steps"]) for line in lines} == {("lora", STEPS)}
    config = json_of(tmp_path / "x" / "config.json")
    assert config["train"]["lr"] == best and config["origins"]["lr"] == [best, "best validation loss of 3 trials"]
    left = set(files(tmp_path / "x"))
    assert not any(name.startswith("trials/") and name.endswith(".safetensors") for name in left)
    assert left >= {f"trials/lr-{rate}/metrics.jsonl" for rate in rates if rate != best}

    assert len(re.findall(r"^run \d of 3: lora lr .*: validation loss", out, re.M)) == 3
    assert "step 2/6" not in out  # a trial has one line
    table = [re.split(r" *\| *", line)[1:-1] for line in out.splitlines() if line.startswith("| lora")]
    assert [(row[1], row[-1]) for row in table] == [(f"lr {r:g}", "yes" if r == best else "") for r in rates]
    assert evaluate(tmp_path / "x", "--prompt", "1: lunch =", "--max-new-tokens", 2).code == 0


def test_lists_are_tried_in_every_combination_by_the_modes_that_have_them(common: list[Any], tmp_path: Path) -> None:
    lists = ["--rank", "2,3", "--lr", "1e-3,1e-2", "--steps", 1]
    out = trained(*common, "--mode", "lora,full", *lists, "--out", tmp_path / "x")
    lines = trials_of(tmp_path / "x" / "lora")
    found = {tuple(line["options"][name] for name in ("lr", "rank")) for line in lines}
    assert len(lines) == 4 and found == set(itertools.product((1e-3, 1e-2), (2, 3)))
    assert [line["options"] for line in trials_of(tmp_path / "x" / "full")] == [{"lr": 1e-3}, {"lr": 1e-2}]
    assert "run 6 of 6: full lr 0.01" in out
    chosen = next(line["options"] for line in lines if line["chosen"])
    config = json_of(tmp_path / "x" / "lora" / "config.json")
    assert {"lr": config["train"]["lr"], "rank": config["mode_options"]["rank"]} == chosen
    tuned = tensors(tmp_path / "x" / "lora" / "tuned.safetensors")
    assert {t.shape[0] for name, t in tuned.items() if name.endswith("c_fc.lora_A")} == {chosen["rank"]}
    results = json_of(tmp_path / "x" / "compare.json")
    assert [result["mode"] for result in results] == ["lora", "full"]


# ---- --lr auto

@pytest.fixture
def default_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modes.MODES, "lora", replace(modes.MODES["lora"], lr=1e-3))


def auto(tmp_path: Path, *more: str) -> Config:
    [config] = configuration.parse(["--model", "m", "--data", "d", "--mode", "lora", "--lr", "auto", *more], "")
    return replace(config, root=tmp_path)


def run_search(config: Config, folder: Path, loss: Callable[..., float | None]) -> list[dict[str, Any]]:
    """The options tried, where `loss(options)` takes the place of training; None is a failure."""
    trials, tried = Trials(config, folder), []
    while (trial := trials.next()) is not None:
        tried.append(trial.options)
        (trial.folder / "metrics.jsonl").write_text("")
        value = loss(trial.options)
        if value is None:
            trials.tell_failure(TrainingFailed("step 1: the loss is nan"))
        else:
            trials.tell(Progress(step=5, best_step=4, best_val_loss=value))
    return tried


@pytest.mark.usefixtures("default_rate")
@pytest.mark.parametrize("optimum, expected", [
    (1e-3, [1e-3, 3e-4, 3e-3]),
    (1e-2, [1e-3, 3e-4, 3e-3, 1e-2, 3e-2]),
    (1e-4, [1e-3, 3e-4, 3e-3, 1e-4, 3e-5]),
    (1e-9, [1e-3, 3e-4, 3e-3, 1e-4, 3e-5, 1e-5, 3e-6]),  # not found: the number of trials has a bound
])  # fmt: skip
def test_auto_continues_to_the_better_side_until_the_best_is_inside(
    tmp_path: Path, optimum: float, expected: list[float]
) -> None:
    tried = run_search(auto(tmp_path), tmp_path, lambda options: math.log(options["lr"] / optimum) ** 2)
    assert [options["lr"] for options in tried] == expected and len(expected) <= 3 + FURTHER
    assert Trials(auto(tmp_path), tmp_path).next() is None  # and a resumed search has nothing more to try
    chosen = Trials(auto(tmp_path), tmp_path).keep_best().train.lr
    assert chosen == min(expected, key=lambda rate: abs(math.log(rate / optimum)))
    if len(expected) < 3 + FURTHER:
        assert min(expected) < chosen < max(expected)
    assert Trials(auto(tmp_path), tmp_path).next() is None


@pytest.mark.usefixtures("default_rate")
def test_auto_goes_to_lower_rates_where_high_ones_fail(tmp_path: Path) -> None:
    tried = run_search(auto(tmp_path), tmp_path, lambda options: None if options["lr"] > 2e-4 else options["lr"])
    assert [options["lr"] for options in tried] == [1e-3, 3e-4, 3e-3, 1e-4, 3e-5, 1e-5, 3e-6]
    lines = trials_of(tmp_path)
    assert [line["val_loss"] for line in lines[:3]] == [None] * 3 and "the loss is nan" in lines[0]["failure"]


@pytest.mark.usefixtures("default_rate")
def test_auto_stops_where_no_rate_is_better(tmp_path: Path) -> None:
    assert len(run_search(auto(tmp_path), tmp_path, lambda options: 1.0)) == 3
    assert Trials(auto(tmp_path), tmp_path).keep_best().train.lr == 1e-3  # the default


@pytest.mark.usefixtures("default_rate")
def test_auto_has_rates_of_its_own_for_each_other_value(tmp_path: Path) -> None:
    best = {2: 1e-3, 4: 1e-2}
    loss = lambda options: math.log(options["lr"] / best[options["rank"]]) ** 2  # noqa: E731
    tried = run_search(auto(tmp_path, "--rank", "2,4"), tmp_path, loss)
    assert [o["rank"] for o in tried] == [2, 2, 2, 4, 4, 4, 4, 4]


# ---- trials that are far behind

RIVAL = {"val_loss": 1.0, "best_step": 20, "steps": 20}
CURVE = {step: 1 + (20 - step) / 10 for step in range(0, 21, 2)}


def test_a_trial_may_be_three_times_as_far_behind_in_the_middle_of_its_steps() -> None:
    limits = trials.stop_losses(RIVAL, CURVE)
    assert limits == pytest.approx({step: 1 + 3 * (20 - step) / 10 for step in (6, 8, 10, 12)})
    moved = trials.stop_losses(RIVAL | {"val_loss": 11.0}, {step: 10 + loss for step, loss in CURVE.items()})
    assert moved == pytest.approx({step: 10 + limit for step, limit in limits.items()})  # only differences count
    assert trials.stop_losses(RIVAL | {"best_step": 18}, CURVE) == {}  # the rival overfitted
    flat = trials.stop_losses(RIVAL, dict.fromkeys(CURVE, 1.0005))
    assert list(flat.values()) == pytest.approx([1.03] * 4)  # its noise stops no trial


def curve(rate: float, step: int) -> float:
    """A made-up validation loss of 20 steps: low rates are slow, high ones are noisy until the schedule ends."""
    return 1 + 4 * math.exp(-rate * step) + rate**2 * (1 + 3 * math.cos(math.pi * step / 40))


def train_by_curve(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The lines of a search for the rate, times 1000, whose trainings follow `curve`."""
    search = Trials(config, folder)
    while (trial := search.next()) is not None:
        progress = Progress()
        with open(trial.folder / "metrics.jsonl", "w") as file:
            while progress.step < 20 and not is_behind(trial.config, progress):
                progress.step += 2
                loss = curve(1000 * trial.options["lr"], progress.step)
                file.write(json.dumps({"step": progress.step, "val_loss": loss}) + "\n")
                if loss < progress.best_val_loss:
                    progress.best_val_loss, progress.best_step = loss, progress.step
        search.tell(progress)
    search.keep_best()
    return trials_of(folder)


@pytest.mark.parametrize("rates", ["0.3e-3,1e-4,1e-3,3e-5", "3e-5,1e-4,0.3e-3,1e-3", "auto"])
def test_trials_stop_and_the_choice_stays(tmp_path: Path, rates: str, default_rate: None) -> None:
    lists = ["--lr", rates]
    whole = train_by_curve(auto(tmp_path / "whole", *lists, "--patience", "0"), tmp_path / "whole")
    lines = train_by_curve(auto(tmp_path / "x", *lists), tmp_path / "x")
    assert [line["options"] for line in lines] == [line["options"] for line in whole]
    assert [line["chosen"] for line in lines] == [line["chosen"] for line in whole]
    assert {line["steps"] for line in whole} == {20} and not any("stopped" in line for line in whole)
    finished: list[dict[str, Any]] = []
    for line in lines:
        rival = trials.best_of(finished)
        limits = {} if rival is None else trials.stop_losses(
            rival, {step: curve(1000 * rival["options"]["lr"], step) for step in range(2, 21, 2)})
        losses = {step: curve(1000 * line["options"]["lr"], step) for step in range(2, 21, 2)}
        behind = [step for step, limit in limits.items() if min(losses[s] for s in losses if s <= step) > limit]
        assert line["steps"] == min(behind, default=20)
        if behind:
            assert line["stopped"] == f"at step {behind[0]}, behind lr {rival['options']['lr']:g}"
        finished.append(line)
    assert any("stopped" in line for line in lines)


@pytest.mark.usefixtures("default_rate")
def test_auto_compares_rates_of_the_same_other_options(tmp_path: Path) -> None:
    """Between others a stopped trial would say too little about the next rate."""
    search, rivals = Trials(auto(tmp_path, "--rank", "2,4"), tmp_path), []
    while (trial := search.next()) is not None:
        rivals.append(trial.best_before and trial.best_before["options"])
        (trial.folder / "metrics.jsonl").write_text("")
        search.tell(Progress(step=5, best_step=5, best_val_loss=trial.options["rank"] + trial.options["lr"]))
    assert rivals[0] is None and next(rival for rival in rivals if rival and rival["rank"] == 4) == {
        "lr": 1e-3, "rank": 4}
    search = Trials(auto(tmp_path / "lists", "--rank", "2,4", "--lr", "1e-3,1e-2"), tmp_path / "lists")
    while (trial := search.next()) is not None:
        last = trial.best_before
        (trial.folder / "metrics.jsonl").write_text("")
        search.tell(Progress(step=5, best_step=5, best_val_loss=trial.options["rank"] + trial.options["lr"]))
    assert last["options"] == {"lr": 1e-3, "rank": 2}  # of lists the best of all trials


def test_a_stopped_trial_is_named(searched: Path) -> None:
    first, best, stopped = trials_of(searched)
    assert best["chosen"] and "stopped" not in first | best and (first["steps"], best["steps"]) == (STEPS, STEPS)
    assert (stopped["steps"], stopped["stopped"]) == (2, "at step 2, behind lr 0.02")
    losses = {line["step"]: line["val_loss"] for line in metrics(searched) if "val_loss" in line}
    low = [line["val_loss"] for line in metrics(searched / "trials" / "lr-0.0001") if "val_loss" in line]
    assert stopped["val_loss"] == min(low) and (losses[2] - losses[6]) * 3 < min(low) - losses[6]
    assert len(low) == 2 and stopped["val_loss"] > best["val_loss"]


# ---- resuming

@pytest.mark.parametrize("stops", [(STEPS + 3,), (STEPS,), (STEPS + 3, 1), (2 * STEPS + 1,), (2 * STEPS + 2,),
                                   (2 * STEPS + 4,), (3 * STEPS + 2,)],
                         ids=["in a trial", "between trials", "twice", "before a trial stops", "where a trial stops",
                              "in a repetition", "after a repetition"])
def test_a_search_resumes_as_one_run(
    common: list[Any], searched: Path, tmp_path: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*common, *SEARCH, "--out", tmp_path / "x"]
    for stop in stops:
        with monkeypatch.context() as patch:
            interrupt(patch, (stop,))
            ended = train(*command)
        assert ended.code == 143 and f"--resume {tmp_path / 'x'} continues from there" in ended.out
        command = ["--resume", tmp_path / "x"]
    out = trained(*command)
    assert ("stopped at step 2, behind lr 0.02, with validation loss" in out) == (stops[0] < 2 * STEPS + 4)
    assert trials_of(tmp_path / "x") == trials_of(searched)
    for name in ("", "seed-1"):
        assert_same_run(searched / name, tmp_path / "x" / name)
    assert set(files(searched)) == set(files(tmp_path / "x"))
    if stops == (2 * STEPS + 4,):
        assert ": validation loss" not in out  # no trial is repeated


SEARCH = ["--lr", "1e-3,2e-2,1e-4", "--seeds", 2]


@pytest.fixture(scope="module")
def searched(common: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "x"
    trained(*common, *SEARCH, "--out", folder)
    return folder


@pytest.mark.parametrize("moved", range(3))
def test_a_choice_that_was_interrupted_is_completed(
    tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `moved` of the three files were moved."""
    [config] = configuration.parse(["--model", "m", "--data", "d", "--rank", "2,4", "--lr", "1e-3,1e-2"], "")
    kept = {"metrics.jsonl", "tuned.safetensors", "last.safetensors"}

    def train_one(options: dict[str, Any]) -> float:
        for name in kept:
            (tmp_path / "trials" / f"lr-{options['lr']}-rank-{options['rank']}" / name).write_text(str(options))
        return abs(options["rank"] - 4) + options["lr"]

    options = run_search(config, tmp_path, train_one)
    assert [tuple(o.values()) for o in options] == list(itertools.product((1e-3, 1e-2), (2, 4)))
    with monkeypatch.context() as patch:
        # trials.jsonl and config.json are written by a replace each
        effects = [*[mock.DEFAULT] * (2 + moved), KeyboardInterrupt]
        patch.setattr(trials.os, "replace", mock.Mock(wraps=trials.os.replace, side_effect=effects))
        with pytest.raises(KeyboardInterrupt):
            Trials(config, tmp_path).keep_best()
    saved = configuration.load(tmp_path)
    for _ in range(2):  # and once more changes nothing
        chosen = Trials(saved, tmp_path).keep_best()
        assert (chosen.train.lr, chosen.mode_options.rank) == (1e-3, 4) == (saved.train.lr, saved.mode_options.rank)
        assert {(tmp_path / name).read_text() for name in kept} == {str({"lr": 1e-3, "rank": 4})}
        assert not list(tmp_path.glob("trials/*/*.safetensors")) and not (tmp_path / "trials/lr-0.001-rank-4").exists()


def test_a_finished_search_continues_beyond_its_end(common: list[Any], tmp_path: Path) -> None:
    options = ["--lr", "1e-3,2e-2", "--seeds", 2, "--schedule", "constant", "--warmup-ratio", 0]
    trained(*common, *options, "--steps", 2, "--out", tmp_path / "x")
    chosen = json_of(tmp_path / "x" / "config.json")["train"]["lr"]
    trained("--resume", tmp_path / "x", "--steps", 4)
    for folder in (tmp_path / "x", tmp_path / "x" / "seed-1"):
        assert len(step_losses(folder)) == 4
        assert json_of(folder / "config.json")["train"]["lr"] == chosen
    trained(*common, *options[2:], "--lr", chosen, "--steps", 4, "--out", tmp_path / "alone")
    assert step_losses(tmp_path / "alone" / "seed-1") == step_losses(tmp_path / "x" / "seed-1")


def test_a_search_from_an_adapter_resumes(
    common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trials that begin after the interruption begin with its parameters too."""
    trained(*common, "--lr", 2e-2, "--out", tmp_path / "first")
    arguments = [*common, "--adapter", tmp_path / "first", "--lr", "1e-4,1e-3"]
    trained(*arguments, "--out", tmp_path / "whole")
    interrupt(monkeypatch, (3,))
    assert train(*arguments, "--out", tmp_path / "x").code == 143
    trained("--resume", tmp_path / "x")
    assert trials_of(tmp_path / "x") == trials_of(tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "x")


# ---- --seeds

def test_seeds_keep_the_rows_and_change_the_rest(common: list[Any], tmp_path: Path) -> None:
    """The rows are cut out of one file, by a hash of the split's seed."""
    source = Path(common[common.index("--data") + 1]) / "train.jsonl"
    arguments = [*common, "--data", source, "--seed", 4]
    out = trained(*arguments, "--seeds", 3, "--out", tmp_path / "x")
    folders = [tmp_path / "x", tmp_path / "x" / "seed-5", tmp_path / "x" / "seed-6"]
    ends = [json_of(folder / "result.json") for folder in folders]
    assert ends[0]["seeds"] == [4, 5, 6]
    assert len({end["base_test_loss"] for end in ends}) == 1
    first = [metrics(folder)[0]["val_loss"] for folder in folders]
    assert first[0] == first[1] == first[2]  # the base on the validation rows; LoRA's B is zero
    losses = [step_losses(folder) for folder in folders]
    assert losses[0] != losses[1] != losses[2]
    drawn = [tensors(folder / "tuned.safetensors")["h.0.attn.c_attn.lora_A"] for folder in folders]
    assert not any((a - b).abs().max() < 1e-3 for a, b in itertools.combinations(drawn, 2))
    assert out.count("run 2 of 3: lora seed 5: test loss") == out.count("run 3 of 3: lora seed 6") == 1

    trained(*arguments, "--seed", 5, "--split-seed", 4, "--out", tmp_path / "alone")
    assert_same_run(tmp_path / "alone", tmp_path / "x" / "seed-5")
    for folder, end in zip(folders[1:], ends[1:], strict=True):
        score = evaluate(folder, "--json", "--dtype", "fp32", "--batch", 4, "--test-rows", 6)
        found = json.loads(score.out)
        assert found["base"]["loss"] == end["base_test_loss"] and found["tuned"]["loss"] == end["test_loss"]


def test_mean_and_standard_deviation(common: list[Any], searched: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("test_loss", "rougeL", "forgetting", "exact_match", "unsupported")
    values = {name: rng.normal(size=5) for name in names}
    results = [{"mode": "lora", "steps": i} | {name: float(values[name][i]) for name in names} for i in range(5)]
    result = average(results, [0, 1, 2, 3, 4])
    assert result["mode"] == "lora" and result["steps"] == 0
    for name in names:
        assert result[name] == pytest.approx(values[name].mean(), rel=1e-12)
        assert result[f"{name}_std"] == pytest.approx(values[name].std(ddof=1), rel=1e-12)
    results[3]["rougeL"] = None
    without = average(results, [0, 1, 2, 3, 4])
    assert without["rougeL"] is None and without["rougeL_std"] is None
    assert average(results[:1], [0])["test_loss_std"] is None

    # of two real runs: that of the first seed alone, and that in seed-1
    lr = json_of(searched / "config.json")["train"]["lr"]
    trained(*common, "--lr", lr, "--out", tmp_path / "first")
    pair = [json_of(folder / "result.json")["test_loss"] for folder in (tmp_path / "first", searched / "seed-1")]
    assert json_of(searched / "result.json")["test_loss"] == pytest.approx(np.mean(pair), rel=1e-12)
    assert json_of(searched / "result.json")["test_loss_std"] == pytest.approx(np.std(pair, ddof=1), rel=1e-9)


def test_the_seeds_of_a_repetition_keep_a_split_seed_that_was_given(tmp_path: Path) -> None:
    [config] = configuration.parse(["--model", "m", "--data", "d", "--seed", "3", "--seeds", "2", "--split-seed", "9"],
                                   "")
    [_, (repetition, folder)] = repetitions(config, tmp_path)
    assert (repetition.train.seed, repetition.data.split_seed, folder.name) == (4, 9, "seed-4")


# ---- trials that fail

def test_a_trial_that_fails_does_not_end_the_search(common: list[Any], tmp_path: Path) -> None:
    """1e30 diverges; 1e-30 leaves every parameter as it is."""
    arguments = [*common, "--mode", "full", "--weight-decay", 0]
    out = trained(*arguments, "--lr", "1e30,1e-3,1e-30", "--out", tmp_path / "x")
    lines = trials_of(tmp_path / "x")
    assert [line["chosen"] for line in lines] == [False, True, False]
    assert lines[0]["val_loss"] is None and "the loss is nan" in lines[0]["failure"]
    assert lines[2]["val_loss"] is None and "nothing was learned" in lines[2]["failure"]
    assert out.count(": failed: ") == 2 and "| full |" in out.replace("  ", " ")
    ended = train(*arguments, "--lr", "1e30,1e29", "--out", tmp_path / "y")
    assert ended.code == 2 and ended.err.startswith("error: every trial failed") and ended.err.count("\n") == 1
    assert not (tmp_path / "y").exists()  # nothing to resume


# ---- refusals

@pytest.mark.parametrize("arguments, words", [
    (["--lr", "1e-3,1e-3"], "argument --lr: 1e-3,1e-3: a value is repeated"),
    (["--lr", "1e-3,x"], "argument --lr: invalid number, list of numbers or auto value: '1e-3,x'"),
    (["--lr", "auto,1e-3"], "argument --lr: invalid number, list of numbers or auto value: 'auto,1e-3'"),
    (["--lr", "1e-3,0"], "--lr 0.0: must be above 0"),
    (["--rank", "4,0"], "--rank 0: must be at least 1"),
    (["--rank", "auto"], "argument --rank: invalid whole number value: 'auto'"),
    (["--mode", "full", "--rank", "4,8"], "--rank belongs to mode lora"),
    (["--mode", "prompt", "--prompt-tokens", "3,96"], "96"),
    (["--batch", "4,8"], "argument --batch: invalid whole number value: '4,8'"),
    (["--split", "90,0,10"], "there are no validation rows"),
])  # fmt: skip
def test_refusals(common: list[Any], tmp_path: Path, arguments: list[str], words: str) -> None:
    source = Path(common[common.index("--data") + 1]) / "train.jsonl"
    ended = train(*common, "--data", source, "--lr", "1e-3,1e-2", *arguments, "--out", tmp_path / "x")
    assert ended.code == 2 and words in ended.err and ended.err.count("\n") == 1, ended.err
    assert not (tmp_path / "x").exists()


def test_refusals_to_resume(common: list[Any], searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("seed-1", "trials/lr-0.0001"):
        ended = train("--resume", searched / part)
        assert ended.code == 2 and "is a part of a run" in ended.err and ended.err.count("\n") == 1
    interrupt(monkeypatch, (3,))
    assert train(*common, *SEARCH, "--out", tmp_path / "x").code == 143
    ended = train("--resume", tmp_path / "x", "--steps", 20)
    assert ended.code == 2 and "has trials to do" in ended.err and ended.err.count("\n") == 1
    (tmp_path / "x" / "trials.jsonl").write_text("{")
    ended = train("--resume", tmp_path / "x")
    assert ended.code == 2 and "trials.jsonl cannot be read" in ended.err and ended.err.count("\n") == 1


# ---- plan, display and speed

def test_a_plan_has_the_setting_that_needs_the_most_memory(
    common: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predict(setting: Config, *_: Any) -> dict[str, Any]:
        return {"mode": setting.mode, "predicted_peak_bytes": getattr(setting.mode_options, "rank", 1) * 2**20}

    monkeypatch.setattr(plan, "predict", mock.Mock(side_effect=predict))
    out = trained(*common, "--mode", "lora,full", "--plan", "--rank", "2,16,4", "--lr", "1e-3,1e-2")
    rows = [re.split(r" *\| *", line) for line in out.splitlines() if line.startswith("| ")]
    assert [row[1] for row in rows[1:]] == ["lora, rank 16", "full"]
    assert plan.predict.call_count == 4  # rates need the same memory


def test_the_time_left_follows_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display = Display(9, is_estimate=True)
    assert display.time_left() == ""
    display.number = 1
    now += 10
    assert display.time_left(part=0.5) == ", about 3 min left"  # 20 s each, and 8.5 of them
    display.trained, now = 1, 120.0
    assert display.place() == "run 1 of about 9" and display.time_left() == ", about 3 min left"
    display.number = display.trained = 8
    now = 180.0
    assert display.time_left() == ", about 10 s left"


def test_the_steady_speed_leaves_the_first_steps_out(common: list[Any], tmp_path: Path) -> None:
    slow = [{"step": i, "tokens": 10, "seconds": 5.0} for i in range(5)]
    fast = [{"step": i, "tokens": 30, "seconds": 1.0 + i % 2} for i in range(5, 15)]
    validation = [{"step": 4, "val_loss": 1.0}]
    assert steady_speed(slow + validation + fast) == 10 * 30 / 15
    assert steady_speed(slow[:3] + fast[:3]) == 90 / (2 + 1 + 2)  # half of a run with less than ten steps
    assert steady_speed(slow[:1]) == 2.0 and steady_speed(validation) is None

    trained(*common, "--steps", 8, "--out", tmp_path / "x")
    lines = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 8 and all(line["seconds"] > 0 for line in steps)
    result = json_of(tmp_path / "x" / "result.json")
    assert result["steady_tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in steps[4:]) / sum(line["seconds"] for line in steps[4:]))
    assert result["tokens_per_second"] == pytest.approx(
        sum(line["tokens"] for line in steps) / sum(line["seconds"] for line in steps))


def test_help_says_which_flags_take_a_list() -> None:
    out = train("--help").out
    assert "--lr FLOAT[,...]" in out and "--rank INT[,...]" in out and "--batch INT " in out
    assert "A flag with [,...] also takes a comma list" in out


def test_scores_are_those_of_the_first_seed_until_all_are_done(searched: Path) -> None:
    assert scores(searched)["seeds"] == [0, 1]
