"""Runs that the version before made still resume, score and save. Each is a new run with the old names put back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import (
    MODES,
    QUICK,
    assert_same_run,
    evaluate,
    interrupt,
    json_of,
    tensors,
    train,
    trained,
    write_pairs,
)

from minift.files import checkpoint

OLD_NAMES = {"evals_since_best": "stale", "early_stopped": "stopped"}  # of the progress in last.safetensors
REMOVED = {"on_nan": "stop", "max_skips": 10}  # training options that only the old version had
ADDED = ("ops", "seeds")  # and those that it did not have

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", model_folder, "--data", pairs, *QUICK, "--steps", 6, "--eval-every", 3, "--model-dropout", 0.1]


def old_training(options: dict[str, Any], removed: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ADDED} | removed


def make_old(folder: Path, **changes: Any) -> None:
    """Rewrite a run's files as the version before wrote them."""
    removed = REMOVED | changes
    raw = json_of(folder / "config.json")
    raw["own"] = raw.pop("mode_options")
    del raw["data"]["split_seed"], raw["search"], raw["part"]
    raw["train"] = old_training(raw["train"], removed)
    origins = {name: [value, "default"] for name, value in removed.items()}
    raw["origins"] = old_training(raw["origins"], origins)
    (folder / "config.json").write_text(json.dumps(raw))
    make_tensor_files_old(folder, removed)


def make_tensor_files_old(folder: Path, removed: dict[str, Any]) -> None:
    for name in (checkpoint.LAST, checkpoint.TUNED):
        found, metadata = checkpoint.read(folder / name)
        metadata["training"] = json.dumps(old_training(json.loads(metadata["training"]), removed))
        if "progress" in metadata:
            progress = json.loads(metadata["progress"])
            progress = {OLD_NAMES.get(key, key): value for key, value in progress.items()}
            metadata["progress"] = json.dumps(progress | {"skipped": 0})
        checkpoint.write(folder / name, {key: tensor.clone() for key, tensor in found.items()}, metadata)


@pytest.mark.parametrize("mode", MODES)
def test_an_old_run_resumes_scores_and_saves(
    common: list[Any], tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*common, "--mode", mode, *(["--rank", 2, "--dropout", 0.2] if mode == "lora" else [])]
    trained(*arguments, "--out", tmp_path / "whole")
    interrupt(monkeypatch, (4,))
    assert train(*arguments, "--out", tmp_path / "x").code == 143
    make_old(tmp_path / "x")
    trained("--resume", tmp_path / "x")
    assert_same_run(tmp_path / "whole", tmp_path / "x")

    make_tensor_files_old(tmp_path / "x", REMOVED)  # config.json is as it was: resuming does not rewrite it
    if mode == "lora":
        options = json.loads(checkpoint.read(tmp_path / "x" / checkpoint.TUNED)[1]["options"])
        assert options["rank_pattern"] is None and options["alpha_pattern"] is None  # the old version wrote them too
    scores = [json.loads(evaluate(tmp_path / name, "--json", "--dtype", "fp32", "--max-new-tokens", 6).out)
              for name in ("whole", "x")]
    assert scores[0] == scores[1]
    ended = evaluate(tmp_path / "x", "--save", tmp_path / "saved")
    assert ended.code == (2 if mode in ("prompt", "adapter") else 0), ended.err  # these two cannot be merged
    if mode == "full":
        saved = tensors(tmp_path / "saved" / "model.safetensors")
        tuned = tensors(tmp_path / "x" / checkpoint.TUNED)
        assert torch.equal(saved["transformer.wte.weight"], tuned["wte.weight"])
    trained(*common, "--adapter", tmp_path / "x", "--steps", 1, "--out", tmp_path / "more")  # it starts another run


def test_an_old_run_that_skipped_steps_is_refused_with_the_reason(
    common: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, (4,))
    assert train(*common, "--out", tmp_path / "x").code == 143
    make_old(tmp_path / "x", on_nan="skip")
    for ended in (train("--resume", tmp_path / "x"), evaluate(tmp_path / "x", "--prompt", "a")):
        assert ended.code == 2 and ended.err.count("\n") == 1
        assert f"{tmp_path / 'x' / 'config.json'} cannot be used: on_nan is 'skip'" in ended.err
        assert "use the version that made it" in ended.err
