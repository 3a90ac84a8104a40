"""Splits and batches of pairs."""

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
from data_files import example, jsonl, numbered, texts, write

from minift.data import dataset
from minift.data.dataset import DataOptions, read_pairs
from minift.data.tokens import Example
from minift.errors import UserError

# Splits


def split_file(tmp_path: Path, content: list, seed: int = 0, **options):
    path = write(tmp_path / "rows.jsonl", jsonl(content))
    return read_pairs(DataOptions(data=str(path), **options), seed)


def test_one_file_is_split_by_prompt(tmp_path):
    rows = [{"prompt": f"p{i % 2000}", "completion": f"c{i}"} for i in range(5000)]
    pairs = split_file(tmp_path, rows)
    parts = [pairs.train, pairs.val, pairs.test]
    prompts = [{pair.prompt for pair in part} for part in parts]
    assert sorted(c for part in parts for _, c in texts(part)) == sorted(row["completion"] for row in rows)
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert [len(part) / 2000 for part in prompts] == pytest.approx([0.8, 0.1, 0.1], abs=0.025)
    assert texts(pairs.train) == [(r["prompt"], r["completion"]) for r in rows if r["prompt"] in prompts[0]]
    assert pairs.notes[-1] == (f"rows.jsonl: split by a hash of the prompt, rows: train {len(parts[0]):,}, "
                               f"val {len(parts[1]):,}, test {len(parts[2]):,}")


def test_the_split_depends_on_seed_and_prompt_only(tmp_path):
    rows = numbered(2000)
    first = split_file(tmp_path, rows)
    assert first == split_file(tmp_path, rows)
    assert texts(first.test) != texts(split_file(tmp_path, rows, seed=1).test)
    random.Random(0).shuffle(rows)
    more = split_file(tmp_path, rows + numbered(2000, start=2000))
    assert set(texts(first.test)) <= set(texts(more.test)) and set(texts(first.val)) <= set(texts(more.val))
    assert set(texts(first.train)) <= set(texts(more.train))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [3, 4, 10])
def test_a_handful_of_rows_is_enough(tmp_path, count, seed):
    for split in ("80,10,10", "1,98,1", "1,1,98"):
        pairs = split_file(tmp_path, numbered(count), seed, split=split)
        assert pairs.train and pairs.val and pairs.test
        assert len(pairs.train) + len(pairs.val) + len(pairs.test) == count


def test_too_few_prompts(tmp_path):
    pairs = split_file(tmp_path, numbered(2) * 10)
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == (20, 0, 0)
    assert pairs.notes[-1].startswith("rows.jsonl: too few different prompts (2) for train + val + test: ")
    pairs = split_file(tmp_path, numbered(2), split="90,0,10")
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == (1, 0, 1)
    assert len(split_file(tmp_path, numbered(1), split="100,0,0").train) == 1


@pytest.mark.parametrize("split", ["", "80", "80,20", "80,10,10,0", "80,10,5", "a,b,c", "110,-10,0",
                                   "nan,50,50", "0,50,50", "80 10 10", "1e999,0,0"])  # fmt: skip
def test_a_malformed_split_is_refused(tmp_path, split):
    with pytest.raises(UserError, match="^--split "):
        split_file(tmp_path, numbered(10), split=split)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Valid", "eval", "evaluation"])
def test_a_folder_names_its_splits(tmp_path, name):
    write(tmp_path / "train.jsonl", jsonl(numbered(5)))
    write(tmp_path / f"{name}.json", json.dumps(numbered(3, start=5)))
    write(tmp_path / "test.csv", "prompt,completion\nq,a\n")
    write(tmp_path / "README.md", "not data")
    pairs = read_pairs(DataOptions(data=str(tmp_path)), seed=0)
    assert texts(pairs.train) == [(f"question {i}", f"answer {i}") for i in range(5)]
    assert (len(pairs.val), texts(pairs.test)) == (3, [("q", "a")])
    places = [note.split(":")[0] for note in pairs.notes]
    assert places == ["train.jsonl", f"{name}.json", "test.csv", str(tmp_path)]
    assert pairs.notes[-1].endswith("files that are not used: README.md")


def test_what_a_folder_lacks_is_cut_out_of_train(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(numbered(200)))
    write(tmp_path / "test.jsonl", jsonl(numbered(7, start=200)))
    pairs = read_pairs(DataOptions(data=str(tmp_path)), seed=0)
    assert len(pairs.test) == 7 and 8 <= len(pairs.val) <= 32
    whole = [(row["prompt"], row["completion"]) for row in numbered(200)]
    assert sorted(texts([*pairs.train, *pairs.val])) == sorted(whole)
    assert pairs.notes[-1].startswith("train.jsonl: split by a hash of the prompt, rows: train 1")
    assert not read_pairs(DataOptions(data=str(tmp_path), split="100,0,0"), seed=0).val


def test_folders_that_are_refused(tmp_path):
    options = DataOptions(data=str(tmp_path))
    with pytest.raises(UserError, match="no train.jsonl .*there is no file"):
        read_pairs(options, 0)
    write(tmp_path / "test.jsonl", jsonl(numbered(3)))
    with pytest.raises(UserError, match="no train.jsonl .*there is test.jsonl"):
        read_pairs(options, 0)
    write(tmp_path / "train.jsonl", jsonl(numbered(3)))
    write(tmp_path / "dev.jsonl", jsonl(numbered(3)))
    write(tmp_path / "valid.csv", "prompt,completion\nq,a\n")
    with pytest.raises(UserError, match="both dev.jsonl and valid.csv are val"):
        read_pairs(options, 0)


def test_duplicates_and_leaks_are_counted(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(numbered(10) + numbered(2) + numbered(1)))
    write(tmp_path / "val.jsonl", jsonl(numbered(5, start=8)))
    write(tmp_path / "test.jsonl", jsonl(numbered(4, start=9)))
    notes = read_pairs(DataOptions(data=str(tmp_path)), seed=0).notes
    assert "train.jsonl: rows that repeat an earlier one exactly, kept: 3" in notes
    assert notes[-3:] == ["val: 2 of its 5 different prompts are also in train",
                          "test: 1 of its 4 different prompts are also in train",
                          "test: 4 of its 4 different prompts are also in val"]


def test_rows_limits_the_training_rows_alone(tmp_path):
    whole, part = split_file(tmp_path, numbered(100)), split_file(tmp_path, numbered(100), rows=7)
    assert part.train == whole.train[:7] and (part.val, part.test) == (whole.val, whole.test)
    assert part.notes[-1] == f"train: the first 7 of {len(whole.train)} rows (--rows)"
    for rows in (0, -1):
        with pytest.raises(UserError, match=f"--rows {rows}: must be 1 or more"):
            split_file(tmp_path, numbered(100), rows=rows)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("count, split, sizes", [
    (20, "80,10,10", (16, 2, 2)), (10, "80,10,10", (8, 1, 1)), (25, "80,10,10", (20, 3, 2)),
    (4, "80,10,10", (2, 1, 1)), (999, "80,10,10", (799, 100, 100)), (30, "50,0,50", (15, 0, 15)),
    (7, "100,0,0", (7, 0, 0)), (1000, "98.5,1,0.5", (985, 10, 5)),
])  # fmt: skip
def test_shares_are_exact_to_the_row(tmp_path, count, split, sizes, seed):
    pairs = split_file(tmp_path, numbered(count), seed, split=split)
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == sizes


@pytest.mark.parametrize("seed", range(6))
def test_prompts_with_several_rows_stay_in_one_split(tmp_path, seed):
    rows = [{"prompt": f"p{i // 3}", "completion": f"c{i}"} for i in range(90)] + numbered(10)
    pairs = split_file(tmp_path, rows, seed)
    parts = [pairs.train, pairs.val, pairs.test]
    assert list(map(len, parts)) == [80, 10, 10]
    prompts = [{pair.prompt for pair in part} for part in parts]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    large = split_file(tmp_path, [{"prompt": f"p{i // 25}", "completion": f"c{i}"} for i in range(100)], seed)
    assert sorted(map(len, (large.train, large.val, large.test))) == [25, 25, 50]


def test_a_split_without_rows_is_said(tmp_path):
    pairs = split_file(tmp_path, numbered(5), split="100,0,0")
    assert pairs.notes[-1] == "no rows for val and test (--split 100,0,0)"


def test_a_folder_says_which_files_it_does_not_use(tmp_path):
    for name in ("train.jsonl.gz", "train_old.jsonl", "notes.txt", "train.py", "eval.json"):
        content = jsonl(numbered(9)).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    (tmp_path / "more").mkdir()
    pairs = read_pairs(DataOptions(data=str(tmp_path), split="90,10,0"), seed=0)
    assert (len(pairs.train), len(pairs.val)) == (9, 9)
    unused = "files that are not used: more/, notes.txt, train.py, train_old.jsonl"
    assert f"{tmp_path}: {unused}" in pairs.notes
    write(tmp_path / "test.parquet", b"PAR1")
    with pytest.raises(UserError, match="test.parquet: this is Parquet"):
        read_pairs(DataOptions(data=str(tmp_path)), seed=0)


def test_texts_are_split_by_document(tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl([{"text": f"document {i}"} for i in range(20)]))
    pairs = read_pairs(DataOptions(data=str(path)), seed=0)
    parts = [{pair.completion for pair in part} for part in (pairs.train, pairs.val, pairs.test)]
    assert list(map(len, parts)) == [16, 2, 2] and len(set.union(*parts)) == 20


def test_one_text_is_cut_in_order_at_line_ends(tmp_path):
    text = "".join(f"This is line {i:03}.\n" for i in range(200))
    path = write(tmp_path / "story.txt", text)
    pairs = read_pairs(DataOptions(data=str(path)), seed=0)
    parts = [pair.completion for pair in (*pairs.train, *pairs.val, *pairs.test)]
    assert "".join(parts) == text and all(part.endswith("\n") for part in parts)
    assert [part.count("\n") for part in parts] == pytest.approx([160, 20, 20], abs=1)
    assert [pair.where for pair in (*pairs.val, *pairs.test)] == ["story.txt:162", "story.txt:182"]
    assert len(read_pairs(DataOptions(data=str(path), split="100,0,0"), seed=0).train) == 1


# Batches


def batches(rows: list[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    numbers = dataset.batches(dataset.row_lengths(rows), batch_size, seed, epoch)
    return [[rows[number] for number in batch] for batch in numbers]


def ragged(count: int, seed: int) -> list[Example]:
    """Skewed lengths: most rows short, a few ten times as long."""
    generator = random.Random(seed)
    return [example(1 + int(generator.expovariate(1 / 40)), generator.randrange(1, 9), start=i)
            for i in range(1, count + 1)]


def padding_share(found: list[list[Example]]) -> float:
    places = sum(len(batch) * max(len(row.ids) for row in batch) for batch in found)
    return 1 - sum(len(row.ids) for batch in found for row in batch) / places


def wheres(found: list[list[Example]]) -> list[list[str]]:
    return [[row.pair.where for row in batch] for batch in found]


@pytest.mark.parametrize("count, batch_size", [(1, 4), (7, 8), (8, 8), (1003, 8), (1003, 1), (2000, 16)])
def test_an_epoch_holds_every_row_once(count, batch_size):
    rows = ragged(count, seed=1)
    found = batches(rows, batch_size, seed=5, epoch=2)
    assert sorted(sum(wheres(found), [])) == sorted(row.pair.where for row in rows)
    assert sorted(map(len, found))[1:] == [batch_size] * (-(-count // batch_size) - 1)
    assert wheres(found) == wheres(batches(rows, batch_size, seed=5, epoch=2))


def test_epochs_and_seeds_differ_in_order_and_company():
    rows = ragged(300, seed=1)
    first = wheres(batches(rows, 8, seed=5, epoch=0))
    for other in (wheres(batches(rows, 8, seed=5, epoch=1)), wheres(batches(rows, 8, seed=6, epoch=0))):
        assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in other}
    lengths = [max(len(row.ids) for row in batch) for batch in batches(rows, 8, seed=5, epoch=0)]
    falls = sum(one > next_one for one, next_one in itertools.pairwise(lengths))
    assert len(lengths) / 3 < falls < len(lengths) * 2 / 3  # long and short batches come in no order


def test_few_rows_still_change_their_company():
    rows = [example(i, 2, start=i) for i in range(1, 61)]  # all of different length
    first, second = ({frozenset(batch) for batch in wheres(batches(rows, 8, seed=0, epoch=epoch))}
                     for epoch in (0, 1))
    assert not first & second


def test_rows_of_like_length_stand_together():
    rows = ragged(4000, seed=2)
    shuffled = random.Random(0).sample(rows, len(rows))
    by_chance = padding_share([shuffled[at : at + 8] for at in range(0, len(rows), 8)])
    assert by_chance > 0.4 and padding_share(batches(rows, 8, seed=0, epoch=0)) < by_chance / 4
