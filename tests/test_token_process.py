"""Tokens from another process: the rows are the same, and it ends with the first one, however that ends."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import EOS, byte_tokenizer, jsonl, load, numbered, write
from scripts import ROOT, run
from tokenizers import Tokenizer, models

from minift.data import dataset, row_cache
from minift.data.dataset import DataOptions, load_examples
from minift.data.token_process import OtherProcess, SameProcess
from minift.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes? <|endoftext|>"},
                     {"role": "user", "content": "Bye\n"}, {"role": "assistant", "content": " Bye. \u00e9\u4e2d"}]}
CONTENTS = {
    "pairs.jsonl": jsonl([*numbered(30), {"prompt": "an end", "completion": "x<|endoftext|>"}]),
    "chats.jsonl": jsonl([CHAT | {"id": i} for i in range(5)]),
    "documents.jsonl": jsonl([{"text": f"document {i} " * i} for i in range(1, 12)]),
}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[OtherProcess]:
    """The other processes, which are used for files of any size, in chunks of three pairs."""
    processes = []

    class Noted(OtherProcess):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            processes.append(self)

    monkeypatch.setattr(dataset, "OtherProcess", Noted)
    monkeypatch.setattr(dataset, "MANY_PAIRS", 1)
    monkeypatch.setattr(dataset, "CHUNK", 3)
    return processes


def has_ended(process: OtherProcess) -> bool:
    return process.process.returncode is not None


@pytest.mark.parametrize("name", CONTENTS)
def test_the_rows_are_those_of_one_process(tmp_path, started, monkeypatch, name):
    path = write(tmp_path / name, CONTENTS[name])
    rows, lines = load(path, 60)
    (process,) = started  # one for all splits
    assert has_ended(process)
    monkeypatch.setattr(dataset, "MANY_PAIRS", 10**9)
    expected, expected_lines = load(path, 60)
    assert len(started) == 1 and lines == expected_lines
    assert {split: list(found) for split, found in rows.items()} == {s: list(e) for s, e in expected.items()}
    assert rows["train"].store.digest == expected["train"].store.digest


def kill(process: OtherProcess) -> None:
    os.kill(process.process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.process.pid, os.WEXITED | os.WNOWAIT)


def interrupt(process: OtherProcess) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("event, code, line", [
    (kill, 2, "error: the process that tokenizes the rows was ended by signal 9: the system does so when memory runs "
              "out, close other programs or use --rows\n"),
    (interrupt, 130, "interrupted\n"),
], ids=["killed", "interrupted"])
@pytest.mark.parametrize("method", ["send", "receive"])
def test_an_end_before_the_last_chunk(tmp_path, started, monkeypatch, method, event: Callable, code, line):
    """The third time that `method` is called, `event` happens before it."""
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "pairs.jsonl", CONTENTS["pairs.jsonl"])
    plain, calls = getattr(OtherProcess, method), []

    def call(self: OtherProcess, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            event(self)
        return plain(self, *arguments)

    monkeypatch.setattr(OtherProcess, method, call)
    ended = run(lambda arguments: load(path, 60))
    assert (ended.code, ended.err) == (code, line)
    (process,) = started
    assert has_ended(process)
    assert [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()] == [
        file.name for file in (tmp_path / "cache").rglob("*.lock")]


def test_the_other_process_ends_when_the_first_is_killed():
    code = ("import tokenizers; from minift.data.token_process import OtherProcess\n"
            "other = OtherProcess(tokenizers.Tokenizer(tokenizers.models.BPE()), 'tokens')\n"
            "other.send([['a']]); other.receive(); print(flush=True); other.receive()")
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    first.stdout.readline()
    first.kill()
    first.communicate(timeout=60)  # standard output ends when both processes, which share it, have ended


def test_an_error_of_the_tokenizer_is_the_same(tmp_path, started):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="?"))  # fails on other words, as it lacks its "?"
    messages = []
    for kind in (SameProcess, OtherProcess):
        worker = kind(tokenizer, "tokens")
        worker.send([["a"]])
        assert worker.receive() == [[bytes(4)]]
        worker.send([["b"]])
        with pytest.raises(UserError, match="the tokenizer fails on one of the texts") as error:
            worker.receive()
        messages.append(str(error.value))
        worker.close()
    assert messages[0] == messages[1]


def test_few_pairs_are_tokenized_in_this_process(tmp_path, started, monkeypatch):
    monkeypatch.setattr(dataset, "MANY_PAIRS", 21)
    path = write(tmp_path / "pairs.jsonl", jsonl(numbered(100)))
    for most, count in ((20, 0), (21, 1)):  # of 100 pairs
        load_examples(DataOptions(data=str(path)), 0, byte_tokenizer(), EOS, 60, {"train": most})
        assert len(started) == count


def test_the_other_process_imports_no_torch():
    code = "import sys, minift.data.token_process\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(ROOT)).returncode == 0
