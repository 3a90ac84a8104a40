"""Runs side by side: eval.py --compare, its table, its findings and its pictures."""

import json
import re
import statistics
import sys

import numpy as np
import pytest
from scripts import evaluate

from minift.errors import UserError
from minift.report import compare, plot, test_rows
from minift.report.table import format_bytes, table, table_head, table_row


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """A picture takes longer than the rest of a comparison."""
    if "picture" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr(plot, "draw_runs", lambda *_: None)
        monkeypatch.setattr(plot, "draw_sizes", lambda *_: None)


def fake_run(folder, **changes):
    """A finished run's folder, as small as it can be."""
    folder.mkdir(parents=True, exist_ok=True)
    result = {"mode": "lora", "learning_rate": 1e-3, "trainable_parameters": 100, "trainable_share": 0.01,
              "peak_memory_bytes": 2**20, "predicted_peak_bytes": 2**20, "tokens_per_second": 1000.0,
              "best_val_loss": 1.0, "test_loss": 1.1, "rougeL": 0.5, "exact_match": 0.1, "forgetting": 0.2,
              "tuned_bytes": 400, "base_test_loss": 3.0, "base_rougeL": 0.1, "best_step": 4, "steps": 4}
    (folder / "result.json").write_text(json.dumps(result | changes))
    lines = [{"step": s, "loss": 3 / s, "lr": 1e-3 / s} for s in (1, 2, 3, 4)]
    lines += [{"step": s, "train_loss": 3 / s, "val_loss": 3.5 / s} for s in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_rows(folder, shift=0.0, noise=0.02, rows=60, base_loss=3.0, seed=0):
    """test_rows.jsonl: ROUGE-L of 0.5 + `shift`, a test loss of 1 - `shift` nats per token, in which rows differ
    much and, beside that, each model by `noise`."""
    difficulty = np.random.default_rng(99).normal(0, 0.1, rows)
    difficulty -= difficulty.mean()
    own = np.random.default_rng(seed).normal(0, noise, rows)
    own -= own.mean()
    models = {"tuned": (0.5 + shift + own + difficulty, 1 - shift + own + difficulty),
              "base": (0.1 + 0 * difficulty, base_loss + difficulty)}
    scores = {}
    for model, (rouge, loss) in models.items():
        scores[model] = {"rows": [
            {"where": f"t:{i}", "loss": 4 * loss[i], "targets": 4, "rouge1": 0.0, "rouge2": 0.0, "rougeL": rouge[i],
             "exact_match": 0, "names": 2, "unsupported": 1, "completion": ""} for i in range(rows)]}
    folder.mkdir(parents=True, exist_ok=True)
    test_rows.write(folder, scores["tuned"], scores["base"])
    return {"rougeL": 0.5 + shift, "test_loss": 1 - shift, "base_test_loss": base_loss}


def measured_run(folder, shift=0.0, noise=0.02, rows=60, base_loss=3.0, seed=0, **changes):
    """A finished run with test rows."""
    fake_run(folder, **add_rows(folder, shift, noise, rows, base_loss, seed) | changes)
    return folder


def sentences(text):
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")]


def cells(text, row, number=0):
    """The cells of the rows that begin with a name, in the table `number` of those that have it, by heading."""
    lines = text.splitlines()
    at = [i for i, line in enumerate(lines) if line.split("|")[1:2] and line.split("|")[1].strip() == row][number]
    head = max(i for i in range(at) if lines[i].startswith("|--")) - 1
    return list(zip(*([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (head, at)), strict=True))


def test_the_script_compares_finished_runs_of_any_folders(tmp_path):
    fake_run(tmp_path / "lora-1")
    fake_run(tmp_path / "lora-2", rougeL=0.6, forgetting=0.3, best_step=2)
    fake_run(tmp_path / "all-1" / "full", mode="full", rougeL=0.598, forgetting=None,
             trainable_parameters=900)
    (tmp_path / "all-1" / "compare.json").write_text("[]")
    (tmp_path / "lora-3").mkdir()
    (tmp_path / "notes.txt").write_text("not a run")
    done = evaluate("--compare", *sorted(path for path in tmp_path.iterdir() if path.suffix != ".png"))
    assert done.code == 0, done.err
    table = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert table in done.out
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["all-1/full", "lora-1", "lora-2"]
    assert [line.split()[1] for line in table.splitlines()[8:12]] == ["base", "all-1/full", "lora-1", "lora-2"]
    assert "- lora-2 overfitted: its validation loss was lowest at step 2 of 4" in table
    assert "lora-3 is left out: it has no result.json" in done.out
    done = evaluate("--compare", tmp_path / "lora-1", tmp_path / "lora-2", "--json")
    results = json.loads(done.out)
    assert [result["run"] for result in results] == ["lora-1", "lora-2"]
    assert any("overfitted" in sentence for sentence in results[1]["findings"])


def test_runs_of_older_versions_are_ordered_without_a_claim(tmp_path):
    folders = [fake_run(tmp_path / "a"), fake_run(tmp_path / "b", rougeL=0.6)]
    text = compare.compare_runs(folders)
    assert "b has the highest ROUGE-L: 0.600 (base: 0.100); the noise of this order is not known." in sentences(text)
    assert "no intervals for a, b: there is no test_rows.jsonl" in text
    assert "do not differ" not in text and "cheapest" not in text and "95 %" not in text


def test_a_difference_that_is_larger_than_its_noise(tmp_path):
    folders = [measured_run(tmp_path / name, shift, seed=i, trainable_parameters=100 - i)
               for i, (name, shift) in enumerate((("a", 0.0), ("b", 0.03), ("c", 0.01)))]
    text = compare.compare_runs(folders)
    first = next(sentence for sentence in sentences(text) if sentence.startswith("b has the highest ROUGE-L: 0.530"))
    found = re.search(r"; the next, c, has 0.510, (0.0\d+) to (0.0\d+) less \(95 %\)", first)
    # b - c is 0.02; its rows differ by 0.02 sqrt(2), and there are 60 of them
    assert [float(end) for end in found.groups()] == pytest.approx([0.0128, 0.0272], abs=0.002)
    assert "b has the lowest test loss: 0.9700 (base: 3.0000); the next, c, has 0.9900" in text
    assert re.search(r"the next, c, has 0.9900, 0.0\d+ to 0.0\d+ more", text)
    assert "cheapest" not in text  # b alone is the best


def test_differences_within_the_noise_are_none_and_the_cheapest_of_that_group_is_named(tmp_path):
    folders = [measured_run(tmp_path / name, shift, seed=i, trainable_parameters=count)
               for i, (name, shift, count) in enumerate((("a", 0.0, 90), ("b", 0.001, 80), ("c", 0.002, 200),
                                                         ("d", -0.1, 5)))]
    text = compare.compare_runs(folders)
    assert "c, b and a do not differ in ROUGE-L on these 60 rows: 0.502, 0.501 and 0.500 (base: 0.100)." in text
    assert "b is the cheapest of these: it trains 1.00% of the parameters, and its file takes 400 B." in text
    assert "the highest ROUGE-L" not in text


def test_the_interval_of_a_score_is_beside_it(tmp_path):
    text = compare.compare_runs([measured_run(tmp_path / "a"), fake_run(tmp_path / "b")])
    headings, values = zip(*cells(text, "a", 1), strict=True)
    assert headings[2:6] == ("test loss", "95 %", "ROUGE-L", "95 %") and values[2:5:2] == ("1.0000", "0.5000")
    low, high = map(float, values[5].split("-"))
    assert (low, high) == pytest.approx((0.474, 0.526), abs=0.006)  # 1.96 * 0.1 / sqrt(60)
    assert dict(cells(text, "b", 1))["95 %"] == "-"
    assert dict(cells(text, "base"))["val loss"] == "-" and ("test loss", "3.0000") in cells(text, "base")
    assert "no intervals for b" in text


def seeded_run(folder, shifts, **changes):
    """A run with a seed for each shift."""
    for seed, shift in list(enumerate(shifts))[1:]:
        measured_run(folder / f"seed-{seed}", shift, seed=10 + seed)
    mean, std = statistics.mean(shifts), statistics.stdev(shifts)
    measured_run(folder, shifts[0], seed=10)
    result = {"seeds": [0, 1, 2], "rougeL": 0.5 + mean, "rougeL_std": std, "test_loss": 1 - mean,
              "test_loss_std": std, "forgetting_std": 0.01}
    old = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(old | result | changes))
    return folder


def test_the_noise_of_seeds_counts_too(tmp_path):
    """The rows alone would tell these two apart, as they do with one seed in another test."""
    a = seeded_run(tmp_path / "a", (-0.05, 0.0, 0.05))
    b = seeded_run(tmp_path / "b", (-0.01, 0.03, 0.07))
    text = compare.compare_runs([a, b])
    assert "b and a do not differ in ROUGE-L on these 60 rows and 3 seeds: 0.530 and 0.500" in text
    assert ("std", "0.0500") in cells(text, "a", 1)
    text = compare.compare_runs([a, seeded_run(tmp_path / "c", (0.40, 0.44, 0.48))])
    assert "c has the highest ROUGE-L: 0.940 (base: 0.100); the next, a, has 0.500" in text
    assert "seed-1" not in text and "c and a do not differ in forgetting over 3 seeds: +0.2000 and +0.2000" in text


def test_forgetting_has_an_error_only_with_seeds(tmp_path):
    text = compare.compare_runs([measured_run(tmp_path / "a", forgetting=0.1), measured_run(tmp_path / "b")])
    assert "a forgot the least, in nats per token on the general text: +0.1000; from one run each" in text
    shifts = (0.0, 0.01, 0.02)
    folders = [seeded_run(tmp_path / "c", shifts, forgetting=0.1), seeded_run(tmp_path / "d", shifts)]
    text = compare.compare_runs(folders)
    assert "c forgot the least, in nats per token on the general text: +0.1000; the next, d, has +0.2000, " in text
    assert "+0.2000, +0.0773 to +0.1227 more (95 %)." in text  # 0.1 +- t(4) 0.01 sqrt(2 / 3), t = 2.776


def test_runs_on_other_rows_are_in_the_table_but_are_not_ranked(tmp_path):
    folders = [fake_run(tmp_path / "a", base_test_loss=2.5), fake_run(tmp_path / "b", base_test_loss=2.0, rougeL=0.9)]
    folders += [measured_run(tmp_path / "c", rows=59), measured_run(tmp_path / "d", rows=60)]
    text = compare.compare_runs(folders)
    assert "not ranked against each other, as base or test rows differ: a | b | c | d." in text
    assert not any(re.search("highest|do not differ|forgot", sentence) for sentence in sentences(text))


def test_each_base_has_an_order_of_its_own(tmp_path):
    small = [measured_run(tmp_path / f"s-{mode}", shift, seed=i, mode=mode, base="x/small", total_parameters=20_000)
             for i, (mode, shift) in enumerate((("full", 0.1), ("lora", 0.0)))]
    large = [measured_run(tmp_path / f"l-{mode}", shift, base_loss=2.0, seed=i, mode=mode, total_parameters=3_000_000)
             for i, (mode, shift) in enumerate((("full", 0.2), ("lora", 0.4)))]
    text = compare.compare_runs(small + large)
    assert "on small, s-full has the highest ROUGE-L: 0.600" in text
    assert "l-lora has the highest ROUGE-L: 0.900" in text
    assert cells(text, "lora") == [("ROUGE-L by size", "lora"), ("20.0k", "0.5000"), ("3.0M", "0.9000")]
    assert cells(text, "base", 0)[1:] == [("20.0k", "0.1000"), ("3.0M", "0.1000")]


def test_a_comparison_keeps_its_own_table_beside_the_runs(tmp_path):
    fake_run(tmp_path / "all-1" / "full", mode="full")
    fake_run(tmp_path / "all-1" / "lora")
    assert "lora" in compare.compare_runs([tmp_path / "all-1"])
    assert (tmp_path / "all-1" / "compare.md").exists() and not (tmp_path / "compare.md").exists()


@pytest.mark.parametrize("rouge, reason", [(None, "ROUGE is not measured"), (0.0, "ROUGE-L is 0 in every run")])
def test_where_rouge_says_nothing_the_test_loss_ranks(tmp_path, rouge, reason):
    changes = {"rougeL": rouge, "base_rougeL": rouge}
    folders = [measured_run(tmp_path / name, shift, seed=i, trainable_parameters=count, **changes)
               for i, (name, shift, count) in enumerate((("a", -0.1, 10), ("b", 0.001, 30), ("c", 0.0, 20)))]
    text = compare.compare_runs(folders)
    assert f"b and c do not differ in test loss on these 60 rows: 0.9990 and 1.0000 (base: 3.0000). {reason}" in text
    assert "c is the cheapest of these" in text and "in ROUGE-L" not in text
    assert ("ROUGE-L", "-" if rouge is None else "0.0000") in cells(text, "a", 1)


def test_a_finding_names_the_runs_that_it_is_about(tmp_path):
    results = []
    for i, (mode, changes) in enumerate((("full", {}), ("lora", {"references_over_limit": 3}),
                                         ("prompt", {"test_loss": 3.5, "forgetting": 0.1}))):
        folder = measured_run(tmp_path / mode, -0.1 if mode == "prompt" else 0.0, seed=i, mode=mode, **changes)
        results.append(compare.load_result(folder))
    text = compare.write(tmp_path, results)
    written = json.loads((tmp_path / "compare.json").read_text())
    full, lora, prompt = (result["findings"] for result in written)
    assert full[0] == lora[0] and "full and lora do not differ in ROUGE-L" in full[0]
    assert lora[-1] == "lora could not match 3 references, which are longer than --max-new-tokens: raise it."
    assert "prompt forgot the least" in prompt[0] and "prompt did not beat the base" in prompt[1] and len(prompt) == 2
    assert all(f"- {sentence}" in (tmp_path / "compare.md").read_text() for sentence in full + lora + prompt)
    assert written[0]["rougeL_interval"][0] < 0.5 < written[0]["rougeL_interval"][1]
    assert "findings" not in results[0] and (tmp_path / "compare.md").read_text() in text


def test_a_run_that_does_not_differ_from_its_base_is_named(tmp_path):
    text = compare.compare_runs([measured_run(tmp_path / "a", noise=20.0)])
    assert "a does not differ from the base in test loss on these 60 rows" in text
    assert "does not differ" not in compare.compare_runs([measured_run(tmp_path / "b")])


TRIALS = [{"mode": "lora", "options": {"lr": lr, "rank": rank}, "steps": 8, "best_step": 8, "val_loss": loss,
           "chosen": loss == 0.5} for lr, rank, loss in ((0.001, 4, 0.9), (0.01, 4, 0.5), (0.01, 8, None))]


def test_the_trials_of_a_search(tmp_path):
    folder = fake_run(tmp_path / "a")
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in TRIALS))
    text = compare.compare_runs([folder, fake_run(tmp_path / "b")])
    assert ("chosen", "rank 4") in cells(text, "a") and ("chosen", "-") in cells(text, "b")
    rows = [dict(cells(text, "a", number)) for number in (2, 3, 4)]
    assert [row["options"] for row in rows] == ["lr 0.001, rank 4", "lr 0.01, rank 4", "lr 0.01, rank 8"]
    assert [row["chosen"] for row in rows] == ["", "yes", ""] and rows[2]["val loss"] == "-"
    assert "stopped" not in rows[0]
    stopped = TRIALS[0] | {"steps": 4, "stopped": "at step 4, behind lr 0.01, rank 4"}
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in [stopped, *TRIALS[1:]]))
    text = compare.compare_runs([folder])
    assert [dict(cells(text, "a", number))["stopped"] for number in (2, 3)] == [stopped["stopped"], "-"]


def test_the_figures_of_other_commands_are_shown_where_a_run_has_them(tmp_path):
    figures = {"latency": {model: {batch: {"first_token_ms": 9.0, "ms_per_token": value, "tokens_per_second": 500.0}
                                   for batch in ("1", "16")}
                           for model, value in (("base", 4.0), ("tuned", 5.0), ("merged", 4.1))},
               "shots": {"shots": 3, "fitted": 2.5, "prompt_tokens": 99.0, "loss": 2.0, "rougeL": 0.2,
                         "models": {"tuned": {"prompt_tokens": 21.0}}},
               "bias": {"base": {"all": {"share": 0.6, "interval": [0.5, 0.7]}},
                        "tuned": {"all": {"share": 0.55, "interval": [0.5, 0.6]}},
                        "change": {"all": {"share": -0.05, "interval": [-0.1, 0.01]}}},
               "steady_tokens_per_second": 1234.5}
    text = compare.compare_runs([fake_run(tmp_path / "a", **figures), fake_run(tmp_path / "b")])
    assert ("steady tokens/s", "1,234") in cells(text, "a")
    row = dict(cells(text, "a", 2))
    assert (row["base ms/token"], row["ms/token"], row["merged ms/token"]) == ("4.00", "5.00", "4.10")
    assert (row["its ROUGE-L"], row["its prompt tokens"], row["prompt tokens"]) == ("0.2000", "99", "21")
    assert (row["base bias"], row["bias"], row["change, points"]) == ("60.0%", "55.0%", "-5.0 (-10.0 to +1.0)")
    text = compare.compare_runs([tmp_path / "b"])
    assert "ms/token" not in text and "bias" not in text and "steady" not in text


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


def test_the_pictures_of_sizes_and_trials(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed: no pictures")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **settings: drawn.append(self))
    small = measured_run(tmp_path / "small", mode="lora", total_parameters=20_000)
    large = measured_run(tmp_path / "large", 0.2, base_loss=2.0, mode="lora", total_parameters=3_000_000)
    (small / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in TRIALS))
    assert "size.png" in compare.compare_runs([small, large])
    runs, sizes = drawn
    _, cost, _, trials = runs.axes
    assert trials.get_xscale() == "log"
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in trials.lines}
    assert lines == {(0.01,): [0.5], (0.001, 0.01): [0.9, 0.5]}  # the ring of the chosen one, and the line of rank 4
    low, high = json.loads(compare.compare_runs([small], as_json=True))[0]["rougeL_interval"]
    bar = cost.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 1], [low, high])
    axes = sizes.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["20.0k", "3.0M"]
    np.testing.assert_allclose(axes.containers[0].lines[0].get_xydata(), [[2e4, 0.5], [3e6, 0.7]])
