"""Runs side by side: eval.py --compare, its table, its findings and its pictures."""

import json
import sys

import pytest
from scripts import evaluate

from minift.errors import UserError
from minift.report import compare, plot
from minift.report.table import format_bytes, table, table_head, table_row


def fake_run(folder, **changes):
    """A finished run's folder, as small as it can be."""
    folder.mkdir(parents=True)
    result = {"mode": "lora", "learning_rate": 1e-3, "trainable_parameters": 100, "trainable_share": 0.01,
              "peak_memory_bytes": 2**20, "predicted_peak_bytes": 2**20, "tokens_per_second": 1000.0,
              "best_val_loss": 1.0, "test_loss": 1.1, "rougeL": 0.5, "exact_match": 0.1, "forgetting": 0.2,
              "tuned_bytes": 400, "base_test_loss": 3.0, "base_rougeL": 0.1, "best_step": 4, "steps": 4}
    (folder / "result.json").write_text(json.dumps(result | changes))
    lines = [{"step": s, "loss": 3 / s, "lr": 1e-3 / s} for s in (1, 2, 3, 4)]
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


@pytest.mark.parametrize("rouge, reason", [(None, "ROUGE is not measured"), (0.0, "ROUGE-L is 0 in every run")])
def test_where_rouge_says_nothing_the_test_loss_ranks(tmp_path, rouge, reason):
    changes = {"rougeL": rouge, "base_rougeL": rouge}
    folders = [fake_run(tmp_path / "a", test_loss=1.2, trainable_parameters=10, **changes),
               fake_run(tmp_path / "b", test_loss=1.0, trainable_parameters=30, **changes),
               fake_run(tmp_path / "c", test_loss=1.005, trainable_parameters=20, **changes)]
    text = compare.compare_runs(folders)
    assert f"b is the best: test loss 1.0000 (base: 3.0000). {reason}" in text
    assert "c is the cheapest within 1 % of the best test loss" in text
    assert "within 1 % of the best ROUGE-L" not in text
    assert text.splitlines()[2].split("|")[11].strip() == ("-" if rouge is None else "0.0000")


def test_a_finding_names_the_run_that_it_is_about(tmp_path):
    results = [{"run": name, **compare.load_result(fake_run(tmp_path / name, **changes))}
               for name, changes in (("a", {"rougeL": 0.9}), ("b", {"references_over_limit": 3}),
                                     ("c", {"test_loss": 3.5, "forgetting": 0.1}))]
    compare.write(tmp_path, results)
    written = json.loads((tmp_path / "compare.json").read_text())
    a, b, c = (result["findings"] for result in written)
    assert [s.split()[:4] for s in a] == [["a", "is", "the", "best:"], ["a", "is", "the", "cheapest"]]
    assert b == ["b could not match 3 references, which are longer than --max-new-tokens: raise it."]
    assert "c forgot the least" in c[0] and "c did not beat the base" in c[1] and len(c) == 2
    assert all(f"- {sentence}" in (tmp_path / "compare.md").read_text() for sentence in a + b + c)


def test_the_table_is_aligned_markdown():
    columns = {"name": ("name", str), "size": ("size", format_bytes), "share": ("of all", "{:.1%}".format)}
    results = [{"name": "a", "size": 2**20, "share": 0.5}, {"name": "longer", "size": None}]
    assert table(results, columns).splitlines() == [
        "| name   |    size | of all |",
        "|--------|--------:|-------:|",
        "| a      | 1.0 MiB |  50.0% |",
        "| longer |       - |      - |",
    ]
    widths = [6, 7, 6]  # the same, row by row
    rows = [table_row(result, columns, widths) for result in results]
    assert "\n".join([table_head(columns, widths), *rows]) == table(results, columns)


@pytest.mark.parametrize("count, text", [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"),
                                         (1.5 * 2**30, "1.5 GiB"), (2**50, "1024.0 TiB")])
def test_bytes_in_units(count, text):
    assert format_bytes(count) == text


def test_the_picture_holds_every_run(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: compare.png is not drawn")
    folders = [fake_run(tmp_path / f"run-{i}", rougeL=0.1 * i, forgetting=None if i == 1 else 0.1)
               for i in range(1, 6)]
    assert f"{tmp_path / 'compare.png'}" in compare.compare_runs(folders)
    picture = (tmp_path / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
    assert width >= 1200 and height >= 400


def test_the_curves_of_one_run(tmp_path):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: no curves.png")
    folder = fake_run(tmp_path / "a")
    start = json.dumps({"step": 0, "train_loss": None, "val_loss": 9.0}) + "\n"
    (folder / "metrics.jsonl").write_text(start + (folder / "metrics.jsonl").read_text())
    drawn = []
    save = figure.Figure.savefig

    def keep(self, *args, **settings):
        drawn.append(self)
        save(self, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure.Figure, "savefig", keep)
        plot.draw_curves(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    losses, rate = drawn[0].axes
    assert [list(line.get_ydata()) for line in losses.lines[:2]] == [[3 / s for s in (1, 2, 3, 4)],
                                                                    [9.0, 1.75, 0.875]]
    assert "best: 0.8750 at step 4" in [line.get_label() for line in losses.lines]
    assert list(rate.lines[0].get_ydata()) == [1e-3 / s for s in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}\n')
    plot.draw_curves(folder)  # before the first validation


def test_without_matplotlib_the_table_is_written_and_the_hint_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = compare.compare_runs([fake_run(tmp_path / "a")])
    assert "pip install matplotlib" in text
    assert (tmp_path / "compare.md").exists() and not (tmp_path / "compare.png").exists()


@pytest.mark.parametrize("text, said", [("{", "cannot be read"), ("[]", "must hold an object"),
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
