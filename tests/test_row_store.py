"""Rows in flat arrays: the same rows, order and hash as lists of objects have, in far less memory."""

import hashlib
import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest
import torch
from data_files import EOS, byte_tokenizer, encode, example, jsonl, load, numbered, write

from minift.data import dataset, pair_file, row_store
from minift.data.dataset import DataOptions, read_pairs
from minift.data.pairs import Pair
from minift.data.tokens import Example
from minift.errors import UserError
from minift.files import checkpoint
from minift.model.packing import pack
from minift.run.config import TrainOptions
from minift.training import count_totals, iterate_steps, largest_batch

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                     {"role": "user", "content": "Bye\n"}, {"role": "assistant", "content": " Bye. \u00e9\u4e2d"}]}
CONTENTS = {
    "pairs.jsonl": jsonl([*numbered(30), {"prompt": "an end", "completion": "x<|endoftext|>"}]),
    "chats.jsonl": jsonl([CHAT | {"id": i} for i in range(5)]),
    "documents.jsonl": jsonl([{"text": f"document {i} " * i} for i in range(1, 12)]),
    "one.txt": "".join(f"line {i}\n" for i in range(40)),
    "table.csv": "prompt,completion\na,b\n\"c\nd\",e\nf,g\n",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_rows_are_those_that_encode_makes(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, CONTENTS[name])
    rows, _ = load(path, 60)
    monkeypatch.setattr(dataset, "CHUNK", 3)
    in_chunks, _ = load(path, 60)
    pairs = read_pairs(DataOptions(data=str(path)), 0)
    for split in ("train", "val", "test"):
        expected, _ = encode(list(getattr(pairs, split)), byte_tokenizer(), EOS, 60)
        assert list(rows[split]) == list(in_chunks[split]) == expected
        assert rows[split].lengths.tolist() == [len(row.ids) for row in expected]
    train = rows["train"]
    assert train and train[-1] == train[len(train) - 1] == list(train)[-1]
    assert list(train[1:]) == list(train)[1:] and list(train[::-2]) == list(train)[::-2]
    assert train[1:].lengths.tolist() == train.lengths[1:].tolist()
    with pytest.raises(IndexError):
        train[len(train)]


def old_hash(rows: dict[str, list[Example]]) -> str:
    """The hash of rows in the files of runs since the first version: a run made then must resume."""
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for row in rows[split]:
            one_span_to_the_end = len(row.spans) == 1 and row.spans[0][1] == len(row.ids)
            learned = row.spans[0][0] if one_span_to_the_end else row.spans
            digest.update(f"{split} {learned} {row.ids};".encode())
    return digest.hexdigest()


@pytest.mark.parametrize("name", ["pairs.jsonl", "chats.jsonl", "one.txt"])
def test_the_hash_of_the_rows_is_that_of_older_runs(tmp_path, name):
    rows, _ = load(write(tmp_path / name, CONTENTS[name]), 60)
    assert checkpoint.training_metadata(TrainOptions(), rows)["rows"] == old_hash(rows)


def old_batches(examples: list[Example], batch_size: int, seed: int, epoch: int) -> list[list[Example]]:
    """The order of rows since the first version, on lists of objects."""
    generator = random.Random(f"{seed} {epoch}")
    shuffled = generator.sample(examples, len(examples))
    pool = batch_size * max(1, min(20, len(examples) // batch_size // 4))
    cut = []
    for begin in range(0, len(shuffled), pool):
        rows = sorted(shuffled[begin : begin + pool], key=lambda row: len(row.ids))
        cut += [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    generator.shuffle(cut)
    return cut


@pytest.mark.parametrize("count, batch", [(1, 4), (37, 4), (400, 3), (3000, 8)])
def test_the_order_is_that_of_older_runs(count, batch):
    generator = random.Random(count)
    rows = [example(generator.randrange(1, 9), generator.randrange(1, 9), start=i) for i in range(1, count + 1)]
    options = TrainOptions(batch=batch, accumulate=2, seed=5)
    steps = iterate_steps(rows, options, 0)
    for epoch in range(2):
        expected = old_batches(rows, batch, 5, epoch)
        found = itertools.chain.from_iterable(itertools.islice(steps, math.ceil(len(expected) / 2)))
        assert list(found) == expected


def test_the_largest_batch_is_the_one_with_the_most_padded_tokens(tmp_path):
    generator = random.Random(0)
    texts = [{"prompt": "p" * generator.randrange(1, 50), "completion": f"{i}"} for i in range(200)]
    rows, _ = load(write(tmp_path / "rows.jsonl", jsonl(texts)), 60, split="100,0,0")
    options = TrainOptions(batch=7, epochs=2)
    batches = [batch for epoch in range(2) for batch in old_batches(list(rows["train"]), 7, 0, epoch)]
    sizes = [len(batch) * max(len(row.ids) for row in batch) for batch in batches]
    assert largest_batch(rows["train"], options) == batches[sizes.index(max(sizes))]
    totals = {len(pack(batch, 0, torch.device("cpu"), round_shapes=True).tokens) for batch in batches}
    assert count_totals(rows["train"], options) == len(totals) > 1


def test_a_row_takes_some_bytes_beside_its_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 20)
    count = 400
    rows = [{"prompt": f"{i} " + "p" * 200, "completion": f"c{i}"} for i in range(count)]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    load(path, 2000)  # what is made once: tables of modules, the tokenizer's
    tracemalloc.start()
    try:
        loaded, _ = load(path, 2000)
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, loaded.values())) == count
    assert now < count * 150  # as Python objects, a row of 210 tokens took some 10,000 bytes
    assert peak < count * 150 + 4 * 20 * 10_000  # and the chunks at work


def test_texts_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", jsonl(numbered(5000)))
    for module in (pair_file, row_store):
        monkeypatch.setattr(module, "open_file", lambda folder, name: open("/dev/full", "w+b"))
        with pytest.raises(UserError, match="cannot be written to .*: No space left on device; free .*TMPDIR"):
            load(path, 100)
        monkeypatch.undo()


def test_a_pair_survives_the_file(tmp_path):
    store = pair_file.NewPairFile(0, None)
    pairs = [Pair("a\n\"\\ \u2028", "\u00e9\U0001f600", "x:1"), Pair("", "\u4e2d\r\n", "\udcff.txt:3"),
             Pair("p" * 10**6, "\0", "x:2", ((0, 2), (5, 9)))]
    for pair in pairs:
        store.append(pair)
        assert [store.read(number) for number in range(len(store))] == pairs[: len(store)]
    stored = pair_file.StoredPairs(store, [2, 0])
    assert list(stored) == [pairs[2], pairs[0]] and stored[-1] == pairs[0] and list(stored[1:]) == [pairs[0]]


def test_splits_of_many_prompts_are_those_of_older_runs(tmp_path):
    """More rows than EXACT_ROWS, by the ranges of a hash, written here a second time."""
    rows = [{"prompt": f"p{i % 1500}", "completion": f"c{i}"} for i in range(2000)]
    pairs = read_pairs(DataOptions(data=str(write(tmp_path / "rows.jsonl", jsonl(rows)))), 7)

    def split_of(prompt: str) -> str:
        point = int.from_bytes(hashlib.sha256(f"7\n{prompt}".encode()).digest()[:6], "big") / 256**6
        return "test" if point < 0.1 else "val" if point < 0.2 else "train"

    for name in ("train", "val", "test"):
        expected = [row["completion"] for row in rows if split_of(row["prompt"]) == name]
        assert [pair.completion for pair in getattr(pairs, name)] == expected
    assert np.array_equal(np.sort(np.concatenate([pairs.train.numbers, pairs.val.numbers, pairs.test.numbers])),
                          np.arange(2000))
