"""Runs side by side: eval.py --compare, its table, its findings and its picture."""

import json
import sys

import pytest
from scripts import evaluate

from minift.errors import UserError
from minift.report import compare


def fake_run(folder, **changes):
    """A finished run's folder, as small as it can be."""
    folder.mkdir(parents=True)
    result = {"mode": "lora", "learning_rate": 1e-3, "trainable_parameters": 100, "trainable_share": 0.01,
              "peak_memory_bytes": 2**20, "predicted_peak_bytes": 2**20, "tokens_per_second": 1000.0,
              "best_val_loss": 1.0, "test_loss": 1.1, "rougeL": 0.5, "exact_match": 0.1, "forgetting": 0.2,
              "tuned_bytes": 400, "base_test_loss": 3.0, "base_rougeL": 0.1, "best_step": 4, "steps": 4}
    (folder / "result.json").write_text(json.dumps(result | changes))
    lines = [{"step": s, "loss": 3 / s} for s in (1, 2, 3, 4)]
    lines += [{"step": s, "train_loss": 3 / s, "val_loss": 3.5 / s} for s in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_script_compares_finished_runs_of_any_folders(tmp_path):
    fake_run(tmp_path / "lora-1")
    fake_run(tmp_path / "lora-2", rougeL=0.6, forgetting=0.3, best_step=2)
    fake_run(tmp_path / "all-1" / "full", mode="full", rougeL=0.598, forgetting=None,
             trainable_parameters=900)
    (tmp_path / "all-1" / "compare.json").write_text("[]")
    (tmp_path / "lora-3").mkdir()
    (tmp_path / "notes.txt").write_text("not a run")
    done = evaluate("--compare", *sorted(tmp_path.iterdir()))
    assert done.code == 0, done.err
    table = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert table in done.out
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["all-1/full", "lora-1", "lora-2"]
    assert "- lora-2 is the best: ROUGE-L 0.600" in table
    assert "- lora-2 is the cheapest within 1 % of the best" in table  # so is full, which trains more
    assert "- lora-1 forgot the least: +0.2000" in table
    assert "- lora-2 overfitted: its validation loss was lowest at step 2 of 4" in table
    assert "lora-3 is left out: it has no result.json" in done.out


def test_runs_on_other_rows_stand_in_the_table_but_are_not_ranked(tmp_path):
    folders = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", base_test_loss=2.0, rougeL=0.9)]
    text = compare.compare_runs(folders)
    assert "not ranked" in text and "is the best" not in text and "forgot the least" not in text


def test_a_comparison_keeps_its_own_table_beside_the_runs(tmp_path):
    fake_run(tmp_path / "all-1" / "full", mode="full")
    fake_run(tmp_path / "all-1" / "lora")
    assert "lora" in compare.compare_runs([tmp_path / "all-1"])
    assert (tmp_path / "all-1" / "compare.md").exists() and not (tmp_path / "compare.md").exists()


def test_the_picture_holds_every_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: compare.png is not drawn")
    folders = [fake_run(tmp_path / f"run-{i}", rougeL=0.1 * i, forgetting=None if i == 1 else 0.1)
               for i in range(1, 6)]
    assert f"{tmp_path / 'compare.png'}" in compare.compare_runs(folders)
    picture = (tmp_path / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width >= 1200 and height >= 400


def test_without_matplotlib_the_table_is_written_and_the_hint_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = compare.compare_runs([fake_run(tmp_path / "a")])
    assert "pip install matplotlib" in text
    assert (tmp_path / "compare.md").exists() and not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("text, said", [("{", "cannot be used"), ("[]", "cannot be used"),
                                        ('{"mode": "lora"}', "rougeL")])
def test_a_damaged_result_is_named(tmp_path, text, said):
    folder = fake_run(tmp_path / "a")
    (folder / "result.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        compare.compare_runs([folder])
    assert "result.json" in str(caught.value)


def test_nothing_to_compare_is_refused(tmp_path):
    done = evaluate("--compare", tmp_path / "nowhere")
    assert done.code == 2 and "no finished run" in done.err and len(done.err.splitlines()) == 1
    done = evaluate()
    assert done.code == 2 and "which run?" in done.err
