"""--ops plain: the scripts run on the plain references of all operations, with the same losses up to rounding."""

import importlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripts import MODES, QUICK, ROOT, evaluate, json_of, metrics, step_losses, trained, write_pairs

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def common(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    pairs = write_pairs(tmp_path_factory.mktemp("data") / "pairs")
    return ["--model", model_folder, "--data", pairs, *QUICK, "--steps", 8, "--eval-every", 4]


@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each reference runs, of the operations that have one behind ops.plain."""
    calls: Counter = Counter()

    def counted(name: str, reference: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            calls[name] += 1
            return reference(*arguments)

        return call

    for path in sorted((ROOT / "minift" / "ops").glob("*.py")):
        if "if ops.plain" not in path.read_text():
            continue
        module = importlib.import_module(f"minift.ops.{path.stem}")
        for name in [name for name in vars(module) if name.endswith("_reference")]:
            calls[name] = 0
            monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_plain_operations_have_the_losses_of_the_fast_ones(common: list[Any], tmp_path: Path, mode: str) -> None:
    for kind in ("fast", "plain"):
        trained(*common, "--mode", mode, "--ops", kind, "--out", tmp_path / kind)
        assert json_of(tmp_path / kind / "config.json")["train"]["ops"] == kind
    fast, plain = step_losses(tmp_path / "fast"), step_losses(tmp_path / "plain")
    assert len(plain) == 8 and plain == pytest.approx(fast, abs=1e-4)
    for a, b in zip(metrics(tmp_path / "fast"), metrics(tmp_path / "plain"), strict=True):
        assert a.keys() == b.keys() and a.get("val_loss") == pytest.approx(b.get("val_loss"), abs=1e-4)
    results = [json_of(tmp_path / kind / "result.json") for kind in ("fast", "plain")]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], abs=1e-4)


def test_eval_runs_on_plain_operations(common: list[Any], tmp_path: Path) -> None:
    trained(*common, "--mode", "lora", "--out", tmp_path / "x")
    options = ["--json", "--dtype", "fp32", "--max-new-tokens", 6]
    fast, plain = (json.loads(evaluate(tmp_path / "x", *options, "--ops", kind).out) for kind in ("fast", "plain"))
    for name in ("base", "tuned"):
        assert plain[name]["loss"] == pytest.approx(fast[name]["loss"], abs=1e-4)
        assert plain[name]["completions"] == fast[name]["completions"]


def test_plain_runs_every_reference(common: list[Any], tmp_path: Path, reference_calls: Counter) -> None:
    options = ["--mode", "lora", "--steps", 1, "--dropout", 0.1, "--model-dropout", 0.1]
    trained(*common, *options, "--ops", "plain", "--out", tmp_path / "x")
    assert reference_calls["attention_reference"] > 0 and all(reference_calls.values()), reference_calls
    reference_calls.clear()
    evaluate(tmp_path / "x", "--dtype", "fp32", "--max-new-tokens", 2, "--ops", "plain")
    assert reference_calls["attention_reference"] > 0


def test_fast_is_the_default_again_after_a_plain_run(
    common: list[Any], tmp_path: Path, reference_calls: Counter
) -> None:
    trained(*common, "--mode", "lora", "--steps", 1, "--ops", "plain", "--out", tmp_path / "x")
    reference_calls.clear()
    trained(*common, "--mode", "lora", "--steps", 1, "--out", tmp_path / "y")
    assert reference_calls["attention_reference"] == 0
