"""Wrong inputs through the real scripts: one line that says what, where and what to do, exit code 2, and no files."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from scripts import QUICK, Ended, evaluate, files, json_of, process, train, trained, write_pairs

import train as train_script
from minift import modes

pytestmark = pytest.mark.usefixtures("quick")


class Place(NamedTuple):
    """Where a case may build what is wrong: an empty folder, and a sound base, pairs and run to spoil."""

    folder: Path
    model: Path
    pairs: Path
    run: Path

    @property
    def common(self) -> list[str]:
        return ["--model", str(self.model), "--data", str(self.pairs), *QUICK, "--steps", "2"]

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def in_model(self, name: str, content: str | bytes) -> list[str]:
        """The base with one file replaced."""
        (self.model / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return self.common

    def config(self, **changes: Any) -> list[str]:
        return self.in_model("config.json", json.dumps(json_of(self.model / "config.json") | changes))

    def data(self, name: str, content: str | bytes, *more: str) -> list[str]:
        path = self.file(name, content)
        return ["--model", str(self.model), "--data", str(path), *QUICK, "--steps", "2", *more]

    def tokenizer(self, content: str | bytes) -> list[str]:
        for name in ("vocab.json", "merges.txt"):
            (self.model / name).unlink()
        # of a GPT2Tokenizer only vocabulary and merges are read: another class has all of the file read
        self.in_model("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return self.in_model("tokenizer.json", content)


@pytest.fixture(scope="module")
def sound_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    pairs = write_pairs(folder / "pairs")
    arguments = ["--model", model_folder, "--data", pairs, *QUICK, "--steps", 2, "--mode", "prompt"]
    trained(*arguments, "--out", folder / "run")
    return folder / "run"


@pytest.fixture
def place(tmp_path: Path, model_folder: Path, sound_run: Path) -> Place:
    shutil.copytree(model_folder, tmp_path / "base")
    shutil.copytree(sound_run, tmp_path / "run")
    return Place(tmp_path / "built", tmp_path / "base", sound_run.parent / "pairs", tmp_path / "run")


ROW = '{"prompt": "a b", "completion": "c"}\n'
ROWS = "".join(f'{{"prompt": "row {i}", "completion": "c"}}\n' for i in range(30))
LONG = 300 * "x"  # for a file name
DEEP = "[" * 100_000 + "]" * 100_000
TOKENIZER = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": None, "post_processor": None, "decoder": None,
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"a": 0, "b": 1}, "merges": []},
}


class Malicious:
    """Unpickling it makes a file: the proof that somebody ran it."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Path.touch, (self.proof,))


def malicious_bin(place: Place) -> list[str]:
    (place.model / "model.safetensors").unlink()
    torch.save({"wte.weight": Malicious(place.model / "ran")}, place.model / "pytorch_model.bin")
    return place.common


def malicious_old_bin(place: Place) -> list[str]:
    (place.model / "model.safetensors").unlink()
    return place.in_model("pytorch_model.bin", pickle.dumps(Malicious(place.model / "ran")))


def index(place: Place, file: str) -> list[str]:
    (place.model / "model.safetensors").rename(place.folder.parent / "outside.safetensors")
    names = {name: file for name in ("wte.weight", "wpe.weight")}
    return place.in_model("model.safetensors.index.json", json.dumps({"weight_map": names}))


def without(place: Place, *names: str) -> list[str]:
    for name in names:
        (place.model / name).unlink()
    return place.common


def panicking(**parts: Any) -> str:
    return json.dumps(TOKENIZER | parts)


# name: (arguments of train.py from a Place, words that its one line must hold)
TRAIN: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    # flags
    "unknown flag": (lambda p: [*p.common, "--learning-rate", "1"], ["--learning-rate", "--help"]),
    "abbreviated flag": (lambda p: [*p.common, "--acc", "2"], ["--acc", "--help"]),
    "flag without value": (lambda p: [*p.common, "--lr"], ["--lr", "expected one argument"]),
    "stray word": (lambda p: [*p.common, "lora"], ["unrecognized arguments: lora"]),
    "unknown mode": (lambda p: [*p.common, "--mode", "qlora"], ["'qlora'", "full, selective, lora"]),
    "mode twice": (lambda p: [*p.common, "--mode", "lora,lora"], ["'lora'", "repeated"]),
    "empty mode in a list": (lambda p: [*p.common, "--mode", "lora,"], ["''", "unknown"]),
    "another mode's flag": (lambda p: [*p.common, "--mode", "full", "--rank", 4], ["--rank", "mode lora"]),
    "nan": (lambda p: [*p.common, "--lr", "nan"], ["--lr", "'nan'"]),
    "infinite": (lambda p: [*p.common, "--clip", "inf"], ["--clip", "'inf'"]),
    "words for a number": (lambda p: [*p.common, "--steps", "many"], ["--steps", "'many'"]),
    "a fraction for a count": (lambda p: [*p.common, "--batch", "1.5"], ["--batch", "'1.5'"]),
    "a count without end": (lambda p: [*p.common, "--seed", "9" * 5000], ["--seed"]),
    "a seed of 30 digits": (lambda p: [*p.common, "--seed", "9" * 30], ["--seed"]),
    "negative steps": (lambda p: [*p.common, "--steps", -1], ["--steps -1", "at least 1"]),
    "no batch": (lambda p: [*p.common, "--batch", 0], ["--batch 0", "at least 1"]),
    "no accumulation": (lambda p: [*p.common, "--accumulate", 0], ["--accumulate 0", "at least 1"]),
    "negative patience": (lambda p: [*p.common, "--patience", -1], ["--patience -1"]),
    "negative seed": (lambda p: [*p.common, "--seed", -1], ["--seed -1"]),
    "negative rows": (lambda p: [*p.common, "--rows", -3], ["--rows -3", "1 or more"]),
    "no test rows": (lambda p: [*p.common, "--test-rows", 0], ["--test-rows 0"]),
    "learning rate of 0": (lambda p: [*p.common, "--lr", 0], ["--lr 0.0", "above 0"]),
    "no epochs": (lambda p: [*p.common, "--epochs", -2], ["--epochs -2.0", "above 0"]),
    "epochs without end": (lambda p: [*p.common, "--epochs", 1e300], ["--epochs", "1,000,000"]),
    "warm-up beyond the run": (lambda p: [*p.common, "--warmup-ratio", 2], ["--warmup-ratio 2.0"]),
    "dropout of everything": (
        lambda p: [*p.common, "--model-dropout", 1], ["--model-dropout 1.0", "below 1"]),
    "unknown schedule": (lambda p: [*p.common, "--schedule", "step"], ["--schedule", "cosine"]),
    "unknown dtype": (lambda p: [*p.common, "--dtype", "fp8"], ["--dtype", "bf16"]),
    "a device that is not here": (lambda p: [*p.common, "--device", "mps"], ["--device mps", "cpu"]),
    "too few positions for new tokens": (
        lambda p: [*p.common, "--max-new-tokens", 96], ["--max-new-tokens 96", "lower it"]),
    "too few positions for a soft prompt too": (
        lambda p: [*p.common, "--mode", "prompt", "--max-new-tokens", 80],
        ["--max-new-tokens 80", "76 positions"]),
    "tiny length limit": (lambda p: [*p.common, "--max-length", 2], ["--max-length 2", "3 or more"]),
    "surrogates": (lambda p: [*p.common, "--template", "{prompt}\udcff"], ["not valid UTF-8"]),
    # options of the modes
    "rank 0": (lambda p: [*p.common, "--rank", 0], ["--rank 0", "at least 1"]),
    "a rank that fits nowhere": (
        lambda p: [*p.common, "--rank", 2**52], ["out of memory", "sizes of the mode"]),
    "unknown target": (lambda p: [*p.common, "--targets", "q,x"], ["--targets q,x", "'x'", "fc"]),
    "all positions for the prompt": (
        lambda p: [*p.common, "--mode", "prompt", "--prompt-tokens", 96],
        ["--prompt-tokens 96", "96 positions"]),
    "prompt text without its flag": (
        lambda p: [*p.common, "--mode", "prompt", "--prompt-text", "x"],
        ["--prompt-init text", "--prompt-text"]),
    "empty prompt text": (
        lambda p: [*p.common, "--mode", "prompt", "--prompt-init", "text", "--prompt-text", ""],
        ["--prompt-text"]),
    "bottleneck 0": (lambda p: [*p.common, "--mode", "adapter", "--bottleneck", 0], ["--bottleneck 0"]),
    "unknown group": (
        lambda p: [*p.common, "--mode", "selective", "--train", "heads"], ["--train", "'heads'", "top:N"]),
    "more blocks than there are": (
        lambda p: [*p.common, "--mode", "selective", "--train", "top:4"], ["top:4", "3 blocks"]),
    "an empty intersection": (
        lambda p: [*p.common, "--mode", "selective", "--train", "norm+mlp"], ["matches no parameter"]),
    # the base
    "model without data": (lambda p: ["--model", p.model], ["--model needs --data"]),
    "no such model folder": (
        lambda p: ["--model", "./nowhere", "--data", p.pairs], ["./nowhere", "config.json"]),
    "unknown name of a model": (
        lambda p: ["--model", "llama", "--data", p.pairs], ["llama", "gpt2-xl", "path"]),
    "no config.json": (lambda p: without(p, "config.json"), ["config.json is missing"]),
    "config.json is binary": (lambda p: p.in_model("config.json", b"\x80\x81\xff"), ["config.json", "JSON"]),
    "config.json is UTF-16": (
        lambda p: p.in_model("config.json", (p.model / "config.json").read_text().encode("utf-16")),
        ["config.json", "JSON"]),
    "config.json is deep": (lambda p: p.in_model("config.json", DEEP), ["config.json", "JSON"]),
    "config.json is a list": (lambda p: p.in_model("config.json", "[]"), ["config.json", "object"]),
    "config.json has NULs": (lambda p: p.in_model("config.json", b"{}\0\0"), ["config.json"]),
    "another architecture": (lambda p: p.config(model_type="llama"), ["config.json", "'llama'", "'gpt2'"]),
    "another activation": (lambda p: p.config(activation_function="swiglu"), ["'swiglu'", "gelu_new"]),
    "a negative size": (lambda p: p.config(n_embd=-24), ["n_embd is -24"]),
    "a size that is a text": (lambda p: p.config(n_layer="3"), ["n_layer is '3'"]),
    "a billion blocks": (lambda p: p.config(n_layer=10**9), ["n_layer is 1000000000"]),
    "sizes beyond any memory": (lambda p: p.config(n_embd=3 * 10**12, n_inner=10**12), ["config.json"]),
    "sizes beyond 64 bits": (lambda p: p.config(vocab_size=10**30), ["config.json"]),
    "a layer too many": (lambda p: p.config(n_layer=4), ["h.3.mlp.c_fc.weight is missing"]),
    "no weights": (lambda p: without(p, "model.safetensors"), ["holds no weights", "model.safetensors"]),
    "weights that are text": (
        lambda p: p.in_model("model.safetensors", "not weights"), ["model.safetensors"]),
    "weights of nothing": (lambda p: p.in_model("model.safetensors", b""), ["model.safetensors", "0 bytes"]),
    "weights cut short": (
        lambda p: p.in_model("model.safetensors", (p.model / "model.safetensors").read_bytes()[:-1]),
        ["model.safetensors", "fetch or save it again"]),
    "a pickle that runs code": (malicious_bin, ["pytorch_model.bin", "plain tensors"]),
    "an old pickle that runs code": (malicious_old_bin, ["pytorch_model.bin", "plain tensors"]),
    "a .bin of nothing": (
        lambda p: [*without(p, "model.safetensors"), *p.in_model("pytorch_model.bin", b"")],
        ["pytorch_model.bin", "plain tensors"]),
    "an index that points outside": (
        lambda p: index(p, "../outside.safetensors"), ["'../outside.safetensors'", "same folder"]),
    "an index of an absolute path": (
        lambda p: index(p, str(p.folder.parent / "outside.safetensors")),
        ["outside.safetensors", "not opened"]),
    "an index of numbers": (
        lambda p: [*without(p, "model.safetensors"), *p.in_model("model.safetensors.index.json",
                                                                 '{"weight_map": {"a": 1}}')],
        ["weight_map", "file names"]),
    "no tokenizer": (lambda p: without(p, "vocab.json", "merges.txt"), ["no tokenizer", "tokenizer.json"]),
    "no tokenizer for a prompt's text": (
        lambda p: [*without(p, "vocab.json", "merges.txt"), "--mode", "prompt", "--prompt-init", "text",
                   "--prompt-text", "x"], ["no tokenizer", "tokenizer.json"]),
    "tokenizer.json is binary": (lambda p: p.tokenizer(b"\x80\0\xff"), ["tokenizer's files"]),
    "tokenizer.json is empty": (lambda p: p.tokenizer(""), ["tokenizer's files"]),
    "tokenizer.json is deep": (lambda p: p.tokenizer(DEEP), ["tokenizer's files"]),
    "tokenizer.json of another kind": (
        lambda p: p.tokenizer('{"model_type": "gpt2"}'), ["tokenizer's files"]),
    "tokenizer.json that panics": (
        lambda p: p.tokenizer(panicking(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ["tokenizer's files", "Precompiled"]),
    "tokenizer.json that panics on texts": (
        lambda p: p.tokenizer(panicking(pre_tokenizer={"type": "FixedLength", "length": 0})),
        ["tokenizer's files", "non-zero"]),
    "a tokenizer of another vocabulary": (
        lambda p: p.tokenizer(panicking(model=TOKENIZER["model"] | {"vocab": {"a": 0, "b": 5000}})),
        ["token 5000", "320"]),
    "vocab.json is a list": (lambda p: p.in_model("vocab.json", "[]"), ["tokenizer's files"]),
    # the data
    "data with a name that is too long": (
        lambda p: ["--model", p.model, "--data", LONG], ["File name too long", "check the path"]),
    "no such data": (
        lambda p: ["--model", p.model, "--data", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    "an unknown kind of file": (lambda p: p.data("x.parquet", b"PAR1"), ["Parquet", "convert", ".jsonl"]),
    "an empty file": (lambda p: p.data("x.jsonl", ""), ["x.jsonl", "no usable row"]),
    "a folder without train": (lambda p: p.data("d/val.jsonl", ROWS)[:2] + ["--data", p.folder / "d"],
                               ["no train.jsonl"]),
    "two training files": (
        lambda p: [*p.data("d/train.jsonl", ROWS), *p.data("d/train.csv", "")[:2], "--data", p.folder / "d"],
        ["train.csv", "train.jsonl", "keep one"]),
    "malformed line": (
        lambda p: p.data("x.jsonl", ROWS + "{nonsense\n"), ["x.jsonl:31", "JSON", "--skip-bad"]),
    "data is binary": (lambda p: p.data("x.jsonl", b"\0\1\2\xff" * 50), ["x.jsonl:1", "NUL"]),
    "data is UTF-16 without a mark": (
        lambda p: p.data("x.jsonl", ROWS.encode("utf-16-le")), ["x.jsonl:1", "NUL", "--encoding utf-16-le"]),
    "data is Latin-1": (lambda p: p.data("x.csv", "prompt,completion\ncaf\u00e9,b\n".encode("latin-1")),
                        ["x.csv:2", "UTF-8"]),
    "data is deep": (lambda p: p.data("x.jsonl", ROW + DEEP + "\n"), ["x.jsonl:2", "deep"]),
    "a JSON object for a list": (lambda p: p.data("x.json", '{"a": 1}'), ["x.json", "fields 'a'"]),
    "unknown fields": (lambda p: p.data("x.jsonl", '{"x": "a", "y": "b"}\n'), ["'x', 'y'", "--prompt-field"]),
    "a field that is not there": (
        lambda p: p.data("x.jsonl", ROWS, "--prompt-field", "text"), ["'text'", "--prompt-field"]),
    "null for a text": (lambda p: p.data("x.jsonl", ROW + '{"prompt": null, "completion": "c"}\n'),
                        ["x.jsonl:2", "null"]),
    "CSV with an open quote": (lambda p: p.data("x.csv", 'prompt,completion\n"a,b\n'), ["x.csv:2", "CSV"]),
    "only empty completions": (
        lambda p: p.data("x.jsonl", '{"prompt": "a", "completion": " "}\n'),
        ["no usable row", "empty completion"]),
    "shares of 90": (lambda p: p.data("x.jsonl", ROWS, "--split", "80,10"), ["--split", "80,10,10"]),
    "a template with an attribute": (
        lambda p: p.data("x.jsonl", ROWS, "--template", "{prompt.__class__}"),
        ["'{prompt.__class__}'", "field"]),
    "a template with an index": (
        lambda p: p.data("x.jsonl", ROWS, "--template", "{prompt[0]}"), ["'{prompt[0]}'", "field"]),
    "a template with a format": (
        lambda p: p.data("x.jsonl", ROWS, "--template", "{prompt!r:>9999999999}"), ["--template", "field"]),
    "a template with a lone brace": (lambda p: p.data("x.jsonl", ROWS, "--template", "{prompt"), ["lone {"]),
    "general text that is not there": (
        lambda p: [*p.common, "--general", "nowhere.txt"], ["nowhere.txt", "UTF-8"]),
    "general text that is binary": (
        lambda p: [*p.common, "--general", p.file("g.txt", b"\xff\xfe\x80")], ["g.txt", "UTF-8"]),
    "general text of nothing": (
        lambda p: [*p.common, "--general", p.file("g.txt", "")], ["g.txt", "fewer than two tokens"]),
    # the run's folder
    "resume of nothing": (lambda p: ["--resume", "nowhere"], ["nowhere", "not a run's folder"]),
    "resume of a base": (lambda p: ["--resume", p.model], ["config.json", "cannot be used"]),
    "resume with other options": (lambda p: ["--resume", p.run, "--lr", 1], ["--resume", "leave out --lr"]),
    "resume with a switch": (lambda p: ["--resume", p.run, "--no-skip-bad"], ["leave out --skip-bad"]),
}


def assert_one_line(ended: Ended, words: list[str]) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    assert "Traceback" not in ended.out + ended.err
    for word in words:
        assert word in ended.err, ended.err
    assert len(ended.err) < 1500 and ended.err[:-1].isprintable()


def test_there_are_at_least_sixty_of_them() -> None:
    assert len(TRAIN) + len(EVAL) + len(OUT) >= 60


# what --out may not be: (a path made from a Place, words)
OUT: dict[str, tuple[Callable[[Place], Path], list[str]]] = {
    "a file": (lambda p: p.file("out", "mine"), ["built/out", "File exists"]),
    "a name that is too long": (lambda p: p.folder / LONG, ["File name too long", "--out"]),
    "below a file": (lambda p: p.file("out", "mine") / "below", ["built/out/below", "Not a directory"]),
    "a run": (lambda p: p.run, ["exists already", "--overwrite"]),
    "a base": (lambda p: p.model, ["exists already"]),
    "somebody's folder": (lambda p: p.file("mine/thesis.txt", "x").parent, ["exists already"]),
}


@pytest.mark.parametrize("name", OUT)
def test_out_is_not_taken_from_anybody(place: Place, name: str) -> None:
    build, words = OUT[name]
    out = build(place)
    before = {name: path.read_bytes() for name in files(place.folder.parent)
              if (path := place.folder.parent / name).is_file()}
    assert_one_line(train(*place.common, "--out", out), words)
    after = {name: path.read_bytes() for name in files(place.folder.parent)
             if (path := place.folder.parent / name).is_file()}
    assert after == before


def edited(place: Place, file: str, old: str, new: str) -> Path:
    text = (place.run / file).read_text()
    assert old in text
    (place.run / file).write_text(text.replace(old, new))
    return place.run


def other_base(place: Place) -> Path:
    from minift.files import safetensors

    tensors, _ = safetensors.read(place.model / "model.safetensors")
    changed = {name: t.clone() for name, t in tensors.items()}
    changed["transformer.wpe.weight"][0, 0] += 1e-3
    safetensors.write(place.model / "model.safetensors", changed, {"format": "pt"})
    return place.model


EVAL: dict[str, tuple[Callable[[Place], list[Any]], list[str]]] = {
    "no run": (lambda p: [], ["run", "--help"]),
    "no such run": (lambda p: ["nowhere"], ["nowhere", "config.json"]),
    "a name that is too long": (lambda p: [LONG], ["File name too long", "check the path"]),
    "a score that is a text": (
        lambda p: ["--compare", edited(p, "result.json", '"rougeL": ', '"rougeL": "x", "was": ')],
        ["result.json", "rougeL is not a number"]),
    "a base for a run": (lambda p: [p.model], ["config.json", "cannot be used"]),
    "a file for a run": (lambda p: [p.file("x", "")], ["built/x"]),
    "unknown flag": (lambda p: [p.run, "--verbose"], ["--verbose", "--help"]),
    "negative temperature": (lambda p: [p.run, "--prompt", "a", "--temperature", -1], ["--temperature -1.0"]),
    "top-p of 2": (lambda p: [p.run, "--prompt", "a", "--temperature", 1, "--top-p", 2], ["--top-p 2.0"]),
    "top-k of 0": (lambda p: [p.run, "--prompt", "a", "--top-k", 0], ["--top-k 0"]),
    "sampling without a prompt": (lambda p: [p.run, "--top-k", 3], ["--top-k", "--prompt"]),
    "JSON of a text": (lambda p: [p.run, "--json", "--prompt", "a"], ["--json", "--prompt"]),
    "empty prompt": (lambda p: [p.run, "--prompt", ""], ["empty prompt"]),
    "a prompt beyond all positions": (lambda p: [p.run, "--prompt", "a " * 200], ["96", "shorten"]),
    "no batch": (lambda p: [p.run, "--batch", 0], ["--batch 0"]),
    "no rows": (lambda p: [p.run, "--test-rows", 0], ["--test-rows 0"]),
    "negative shown": (lambda p: [p.run, "--shown", -1], ["--shown -1"]),
    "no new tokens": (lambda p: [p.run, "--max-new-tokens", 0], ["--max-new-tokens 0"]),
    "other data that are not there": (lambda p: [p.run, "--data", "nowhere"], ["nowhere"]),
    "general text that is not there": (lambda p: [p.run, "--general", "nowhere.txt"], ["nowhere.txt"]),
    "another base": (
        lambda p: [p.run, "--model", other_base(p)], ["tuned on the base", "fingerprint", "--model"]),
    "a soft prompt as a folder": (
        lambda p: [p.run, "--save", p.folder / "hf"], ["soft prompt", "cannot be merged"]),
    "no tuned file": (lambda p: [(p.run / "tuned.safetensors").unlink() or p.run, "--prompt", "a"],
                      ["tuned.safetensors is missing", "last.safetensors", "--resume"]),
    "an empty config.json": (
        lambda p: [p.file("r/config.json", "{}").parent], ["config.json", "cannot be used"]),
    "a config.json that is deep": (lambda p: [p.file("r/config.json", DEEP).parent], ["config.json"]),
    "other options of the mode": (
        lambda p: [edited(p, "config.json", '"prompt_tokens": 20', '"prompt_tokens": 21')],
        ["tuned.safetensors", "prompt_tokens 20 and not 21"]),
    "an option of a wrong kind": (
        lambda p: [edited(p, "config.json", '"batch": 4', '"batch": "4"')], ["config.json", "batch is '4'"]),
    "an option out of range": (
        lambda p: [edited(p, "config.json", '"batch": 4', '"batch": 0')], ["--batch 0", "at least 1"]),
    "an option of a newer version": (
        lambda p: [edited(p, "config.json", '"batch": 4', '"batch": 4, "later": 1')], ["'later'", "update"]),
    "a mode of a newer version": (
        lambda p: [edited(p, "config.json", '"mode": "prompt",\n  "train"', '"mode": "later",\n  "train"')],
        ["config.json", "later"]),
}


@pytest.mark.parametrize(
    "script, name", [*(("train", name) for name in TRAIN), *(("eval", name) for name in EVAL)]
)
def test_one_line_says_what_is_wrong(place: Place, script: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, words = (TRAIN if script == "train" else EVAL)[name]
    arguments = build(place)
    monkeypatch.chdir(place.folder.parent)
    before = set(files(place.folder.parent))
    if script == "train":
        out = [] if "--resume" in arguments else ["--out", place.folder.parent / "out"]
        assert_one_line(train(*arguments, *out), words)
    else:
        assert_one_line(evaluate(*arguments), words)
    assert set(files(place.folder.parent)) == before


def test_a_missing_gpu_is_reported(place: Place) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    ended = train(*place.common, "--device", "cuda", "--out", place.folder / "out")
    assert_one_line(ended, ["--device cuda", "there is cpu"])
    assert not place.folder.exists()


@pytest.mark.parametrize("name", ["tokenizer.json that panics", "surrogates"])
def test_the_real_scripts_say_it_too(place: Place, name: str) -> None:
    build, words = TRAIN[name]
    place.folder.mkdir()
    ended = process("train.py", *build(place), "--out", place.folder / "out", cwd=place.folder)
    assert_one_line(ended, words)
    assert not (place.folder / "out").exists()


def test_standard_input_that_is_not_text(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\x80")))
    assert_one_line(evaluate(place.run, "--prompt", "-"), ["standard input", "UTF-8"])


def test_debug_shows_the_traceback(place: Place) -> None:
    ended = train(*place.common, "--rank", 0, "--debug", "--out", place.folder / "out")
    assert ended.code == 2 and "Traceback (most recent call last)" in ended.err and "options.py" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: --rank 0")


def test_a_bug_shows_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(train_script, "total_steps", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):  # Python shows it, and exits with 1
        train(*place.common, "--out", place.folder / "out")


def test_a_bug_of_a_mode_shows_its_traceback(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a mode's apply is its author's: no line that blames the options of the person who runs it."""
    def broken(model: Any, options: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setitem(modes.MODES, "lora", replace(modes.MODES["lora"], apply=broken))
    for arguments in ([*place.common, "--out", place.folder / "out"], [*place.common, "--plan"]):
        with pytest.raises(RuntimeError, match="mat1 and mat2"):  # Python shows it, and exits with 1
            train(*arguments)
    assert not (place.folder / "out").exists()


def test_too_little_memory_is_reported_in_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: Any) -> None:
        torch.empty(2**55, dtype=torch.uint8)

    monkeypatch.setattr(modes.lora.LoRALinear, "forward", greedy)
    ended = train(*place.common, "--out", place.folder / "out")
    assert_one_line(ended, ["out of memory", "--batch"])


def test_texts_that_the_terminal_cannot_show(place: Place) -> None:
    rows = "".join(f'{{"prompt": "row {i} \u2603", "completion": "\u96ea {i}"}}\n' for i in range(12))
    arguments = place.data("x.jsonl", rows)
    ended = process("train.py", *arguments, cwd=place.folder.parent, PYTHONIOENCODING="ascii")
    assert ended.code == 0, ended.err
    assert "\\u96ea" in ended.out
