"""The scripts of the public data sets, on small files of the same form; nothing here needs a network."""

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from unittest import mock

import pytest
import scripts
from scripts import ROOT, Ended

from data import prepare
from minift.errors import UserError

SCRIPTS = ("samsum", "dialogsum", "e2e", "alpaca", "crows_pairs")


def run(name: str, folder: Path, *arguments: str | Path, **environment: str) -> Ended:
    """`python data/NAME/prepare.py --out FOLDER/out ARGUMENTS`, in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / name / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with mock.patch.dict(os.environ, environment), contextlib.chdir(folder):
        return scripts.run(script.main, "--out", folder / "out", *arguments)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]


def write_csv(path: Path, items: list[dict[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, items[0])
        writer.writeheader()
        writer.writerows(items)


def write_jsonl(path: Path, items: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def assert_counts_are_warned_of(done: Ended, count: int) -> None:
    assert done.code == 0, done.err
    warnings = done.err.splitlines()
    assert len(warnings) == count and all(" rows, known are " in line for line in warnings), done.err


CHATS = [
    {"id": "1", "dialogue": "Ann: hi,\r\nBob: \"hé\"\u2028! ", "summary": "They greet."},
    {"id": "13828807", "dialogue": "", "summary": "Nothing is said."},
]


@pytest.mark.parametrize("form", ["mirror", "original", "lines"])
def test_samsum_keeps_every_text_and_the_empty_row(tmp_path: Path, form: str) -> None:
    for split in ("train", "validation", "test"):
        if form == "mirror":
            write_csv(tmp_path / f"{split}.csv", CHATS)
        elif form == "original":
            name = {"validation": "val"}.get(split, split)
            (tmp_path / f"{name}.json").write_text(json.dumps(CHATS), encoding="utf-8")
        else:
            write_jsonl(tmp_path / f"{split}.jsonl", CHATS)
    assert_counts_are_warned_of(run("samsum", tmp_path, "--source", tmp_path), 3)
    for split in ("train", "val", "test"):
        assert rows(tmp_path / "out" / f"{split}.jsonl") == [
            {"dialogue": chat["dialogue"], "summary": chat["summary"]} for chat in CHATS
        ]


def test_dialogsum_gives_each_reference_of_the_test_set_a_row(tmp_path: Path) -> None:
    one = {"fname": "train_0", "dialogue": "#Person1#: Hi", "summary": "A greeting.", "topic": "greeting"}
    three = {"fname": "test_0", "dialogue": "#Person1#: Bye", "summary1": "a", "topic1": "t", "summary2": "b",
             "topic2": "t", "summary3": "c", "topic3": "t"}  # fmt: skip
    for name, item in (("train", one), ("dev", one), ("test", three)):
        write_jsonl(tmp_path / f"dialogsum.{name}.jsonl", [item])
    assert_counts_are_warned_of(run("dialogsum", tmp_path, "--source", tmp_path), 3)
    for split in ("train", "val"):
        assert rows(tmp_path / "out" / f"{split}.jsonl") == [
            {"dialogue": "#Person1#: Hi", "summary": "A greeting."}
        ]
    assert rows(tmp_path / "out" / "test.jsonl") == [
        {"dialogue": "#Person1#: Bye", "summary": summary} for summary in "abc"
    ]


def test_e2e_parts_mr_and_ref(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        line = f"name : {name} | price : £ 20||It is cheap . \n"
        (tmp_path / f"{name}.txt").write_text(line, encoding="utf-8")
    assert_counts_are_warned_of(run("e2e", tmp_path, "--source", tmp_path), 3)
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        assert rows(tmp_path / "out" / f"{split}.jsonl") == [
            {"mr": f"name : {name} | price : £ 20", "ref": "It is cheap ."}
        ]


def test_alpaca_is_cut_by_prompt(tmp_path: Path) -> None:
    items = [{"instruction": f"Add {i % 3}", "input": str(i), "output": str(copy)}
             for i in range(300) for copy in range(2)]  # fmt: skip
    (tmp_path / "alpaca_data.json").write_text(json.dumps(items), encoding="utf-8")
    assert_counts_are_warned_of(run("alpaca", tmp_path, "--source", tmp_path), 1)
    splits = [rows(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "val", "test")]
    assert sorted(map(str, sum(splits, []))) == sorted(map(str, items))
    prompts = [{(row["instruction"], row["input"]) for row in split} for split in splits]
    assert sum(map(len, prompts)) == 300
    assert 220 < len(prompts[0]) < 260 and 15 < len(prompts[1]) < 45 and 15 < len(prompts[2]) < 45

    (tmp_path / "fewer.json").write_text(json.dumps(items[100:][::-1]), encoding="utf-8")
    assert run("alpaca", tmp_path, "--source", tmp_path / "fewer.json").code == 0
    for split, before in zip(("train", "val", "test"), prompts, strict=True):
        now = {(row["instruction"], row["input"]) for row in rows(tmp_path / "out" / f"{split}.jsonl")}
        assert now <= before  # a prompt keeps its side


def test_crows_pairs_keeps_the_columns_that_are_scored(tmp_path: Path) -> None:
    pair = {"sent_more": "Women can't drive, \"they\" say.", "sent_less": "Men can't drive, \"they\" say.",
            "stereo_antistereo": "stereo", "bias_type": "gender"}  # fmt: skip
    write_csv(tmp_path / "crows_pairs_anonymized.csv", [{"": "0", **pair, "annotations": "[['gender']]"}])
    assert_counts_are_warned_of(run("crows_pairs", tmp_path, "--source", tmp_path), 1)
    assert rows(tmp_path / "out" / "test.jsonl") == [pair]


WRONG = {
    "not JSON": ('{"dialogue": "a", "summary": "b"}\nhello\n', "train.jsonl:2: not valid JSON"),
    "another field": ('{"dialogue": "a", "text": "b"}\n', "train.jsonl:1: no text in a field 'summary'"),
    "null": ('{"dialogue": null, "summary": "b"}\n', "train.jsonl:1: no text in a field 'dialogue'"),
    "half a surrogate pair": ('{"dialogue": "\\ud800", "summary": "b"}\n', "train.jsonl:1: 'utf-8' codec"),
    "a list": ("[1]\n", "train.jsonl:1: the row is a list"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_file_is_one_line_and_writes_nothing(tmp_path: Path, case: str) -> None:
    content, problem = WRONG[case]
    (tmp_path / "train.jsonl").write_text(content, encoding="utf-8")
    for script in ("samsum", "dialogsum"):
        done = run(script, tmp_path, "--source", tmp_path)
        assert done.code == 2 and done.err.count("\n") == 1 and problem in done.err, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_source_without_the_files(tmp_path: Path, script: str) -> None:
    (tmp_path / "notes.pdf").write_text("x")
    for name, problem in ((".", "holds no file"), ("no", "no such file"), ("notes.pdf", "notes.pdf")):
        done = run(script, tmp_path, "--source", tmp_path / name)
        assert done.code == 2 and done.err.count("\n") == 1 and problem in done.err, done.err


def test_one_file_is_not_taken_for_all_splits(tmp_path: Path) -> None:
    """In a process of its own, from another folder."""
    write_jsonl(tmp_path / "train.jsonl", CHATS)
    done = scripts.process("data/samsum/prepare.py", "--source", "train.jsonl", "--out", "out", cwd=tmp_path)
    assert done.code == 2 and "is one file, give the folder" in done.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_network_it_says_what_to_fetch_by_hand(tmp_path: Path, script: str) -> None:
    proxy = "http://127.0.0.1:9"  # nothing listens there
    done = run(script, tmp_path, HTTPS_PROXY=proxy, https_proxy=proxy, NO_PROXY="", no_proxy="")
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert "cannot fetch https://" in done.err and "--source" in done.err


def test_fetched_file_must_be_the_known_one(tmp_path: Path) -> None:
    """urllib takes file: addresses too, which stand here for the network."""
    write_jsonl(tmp_path / "data.jsonl", CHATS)
    url = (tmp_path / "data.jsonl").as_uri()
    digest = hashlib.sha256(prepare.jsonl(CHATS)).hexdigest()
    known = prepare.PublicFile("train", url, ("data",), (1, 2), digest)

    def read(file: prepare.PublicFile, source: Path | None = None) -> list[dict[str, str]]:
        return prepare.read_files((file,), source, lambda fields: [fields])["train"]

    assert prepare.jsonl([{"mr": "£ 20"}]) == '{"mr": "£ 20"}\n'.encode()  # what the known hashes are of
    assert read(known) == CHATS
    for wrong, problem in (({"rows": (3,)}, "2 rows, known are 3: not"), ({"sha256": "0" * 64}, "sha256")):
        with pytest.raises(UserError, match=problem):
            read(dataclasses.replace(known, **wrong))
        assert read(dataclasses.replace(known, **wrong), tmp_path) == CHATS  # a warning for a copy at hand
    with pytest.raises(UserError, match="cannot fetch file:.*--source"):
        read(dataclasses.replace(known, url=url + ".gone"))


def test_full_disk_leaves_no_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.jsonl").write_text("previous")

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="train.jsonl: cannot be written: No space left on device"):
        prepare.write_splits({"train": CHATS}, tmp_path)
    assert (tmp_path / "train.jsonl").read_text() == "previous" and os.listdir(tmp_path) == ["train.jsonl"]
