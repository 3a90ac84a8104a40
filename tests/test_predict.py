"""eval.py --predict: a prediction for each row of a file, as its users run it."""

import csv
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_files import EOS, byte_tokenizer, encode, jsonl, read_file, write
from scripts import QUICK, Ended, command, evaluate, process, trained, write_pairs

from minift.data import dataset
from minift.data.dataset import DataOptions
from minift.data.pairs import Prompt
from minift.files.weights import Base
from minift.model.gpt import GPT
from minift.report import predict
from minift.report.predict import Decoding, Predictor, windows, without_join
from minift.report.prediction_rows import NewRows, find_layout

PLAIN = ["--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6"]

pytestmark = pytest.mark.usefixtures("quick")


def train_run(folder: Path, model_folder: Path, data: Path, *options: Any) -> Path:
    common = ["--model", model_folder, "--data", data, *QUICK, "--steps", 6, "--warmup-ratio", 0, "--lr", 3e-2]
    trained(*common, *options, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, pairs: Path) -> Path:
    return train_run(tmp_path_factory.mktemp("runs") / "run", model_folder, pairs)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def new_rows(count: int) -> list[dict[str, Any]]:
    """Ragged rows with other fields."""
    return [{"id": i, "prompt": f"{i}: {'lunch late food ' * (i % 5)}cheap =", "tags": [i, None, "\u00fc"]}
            for i in range(count)]


def assert_one_line(ended: Ended, *words: str) -> None:
    assert ended.code == 2 and ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    for word in words:
        assert word in ended.err, ended.err


# What is predicted


def test_predictions_are_the_completions_that_are_scored(run: Path, pairs: Path, tmp_path: Path) -> None:
    test_rows = rows_of(pairs / "test.jsonl")
    new = [{"id": i, "prompt": row["prompt"], "note": 2.5} for i, row in enumerate(test_rows)]
    file, out = write(tmp_path / "new.jsonl", jsonl(new)), tmp_path / "out.jsonl"
    ended = evaluate(run, "--predict", file, "--out", out, *PLAIN)
    assert (ended.code, ended.out) == (0, "") and "6 rows, template '{prompt}'" in ended.err
    assert f"{out}: 6 predictions written" in ended.err
    predicted = rows_of(out)
    assert [{name: row[name] for name in row if name != "prediction"} for row in predicted] == new
    scored = json.loads(evaluate(run, "--json", *PLAIN).out)["tuned"]["completions"]
    assert [row["prediction"].strip() for row in predicted] == scored and any(scored)


def test_the_real_script_from_standard_input_to_standard_output(run: Path, tmp_path: Path) -> None:
    text = jsonl(new_rows(5))
    file, out = write(tmp_path / "new.jsonl", text), tmp_path / "out.jsonl"
    piped = process("eval.py", run, "--predict", "-", *PLAIN, cwd=run.parent, text=text)
    assert piped.code == 0, piped.err
    assert evaluate(run, "--predict", file, "--out", out, *PLAIN).code == 0
    assert piped.out == out.read_text(encoding="utf-8") and piped.out.count("\n") == 5
    bad = process("eval.py", run, "--predict", "-", *PLAIN, cwd=run.parent, text=text + '{"prompt": null}\n')
    assert_one_line(bad, "error: standard input:6: field 'prompt' is null")


def test_a_table_with_the_template_of_the_run(model_folder: Path, tmp_path: Path) -> None:
    def table(name: str, columns: list[str], count: int) -> Path:
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows([[f"{column} {i}" for column in columns] for i in range(count)])
        return write(tmp_path / name, text.getvalue())

    data = table("pairs.csv", ["q", "a"], 30)
    run = train_run(tmp_path / "run", model_folder, data, "--template", "{q}? So:", "--completion-field", "a")
    file, out = table("new.csv", ["id", "q"], 3), tmp_path / "out.jsonl"
    ended = evaluate(run, "--predict", file, "--out", out, *PLAIN, "--prediction-field", "a")
    assert ended.code == 0 and "template '{q}? So:'" in ended.err, ended.err
    predicted = rows_of(out)
    assert [(row["id"], row["q"]) for row in predicted] == [(f"id {i}", f"q {i}") for i in range(3)]
    raw = evaluate(run, "--prompt", "q 1? So:", "--raw", *PLAIN)
    assert predicted[1]["a"].strip() == raw.out.strip() and raw.err == ""
    other = evaluate(run, "--predict", file, "--prompt-field", "id", *PLAIN)
    assert other.code == 0 and "template '{id}'" in other.err


def test_a_peft_folder_predicts_with_the_flags_alone(run: Path, model_folder: Path, tmp_path: Path) -> None:
    assert evaluate(run, "--save-peft", tmp_path / "peft").code == 0
    rows = [{"q": row["prompt"]} for row in new_rows(3)]
    file = write(tmp_path / "new.jsonl", jsonl(rows))
    arguments = [tmp_path / "peft", "--model", model_folder, "--predict", file, *PLAIN]
    assert_one_line(evaluate(*arguments), "which of its fields 'q'")
    ended = evaluate(*arguments, "--template", "{q}")
    assert ended.code == 0 and ended.out == evaluate(run, "--predict", file, "--prompt-field", "q", *PLAIN).out


def test_sampling_depends_on_the_seed(run: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "new.jsonl", jsonl(new_rows(10)))

    def texts(*options: Any) -> str:
        ended = evaluate(run, "--predict", file, *PLAIN, *options)
        assert ended.code == 0, ended.err
        return ended.out

    warm = ["--temperature", 1.5]
    assert texts(*warm, "--seed", 1) == texts(*warm, "--seed", 1) != texts(*warm, "--seed", 2)
    assert texts(*warm, "--top-k", 1) == texts()


# Tokens: a tokenizer with one token a byte


@pytest.fixture
def predictor(make_gpt: Callable[..., GPT]) -> Callable[..., Predictor]:
    def make(max_new_tokens: int = 6, **data: Any) -> Predictor:
        model = make_gpt(vocab_size=EOS + 1, eos_token_id=EOS)
        base = Base("base", None, model, byte_tokenizer(), None, EOS)
        return Predictor(model, base, DataOptions(**data), Decoding(max_new_tokens), 4)

    return make


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_chat_has_the_tokens_of_training(predictor: Callable[..., Predictor], tmp_path: Path, turns: str) -> None:
    asked = (("user", "a"), ("assistant", "b\n\n"), ("user", "c"))
    options = DataOptions(turns=turns)
    answered = write(tmp_path / "train.jsonl", jsonl([chat(*asked, ("assistant", "d"))]))
    trained_pairs, _ = read_file(answered, turns=turns)
    [example], _ = encode(trained_pairs, byte_tokenizer(), EOS, 96)
    file = write(tmp_path / "new.jsonl", jsonl([chat(*asked), chat(*asked, ("assistant", "not read"))]))
    rows = list(NewRows(file, options, find_layout(file, options, None), "prediction"))
    assert [row.learned for row in rows] == [trained_pairs[0].learned] * 2
    assert predictor().encode(rows, file, 80) == [example.prompt] * 2


def test_a_long_prompt_loses_its_beginning(predictor: Callable[..., Predictor]) -> None:
    file, prompts = Path("new.jsonl"), [Prompt("x" * 200 + "yz", {}, "new.jsonl:1"), Prompt("z", {}, "new.jsonl:2")]
    some = predictor(max_new_tokens=90)
    assert some.prompt_room() == 6
    long, short = some.encode(prompts, file, some.prompt_room())
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(long) == "xxxxyz" and tokenizer.decode(short) == "z" and some.counts["shortened"] == 1
    assert predictor(max_length=20).prompt_room() == 18


def test_join_is_not_part_of_a_prediction() -> None:
    assert without_join("Q:", " yes", " ") == "yes"
    assert without_join("def f():", "    return 1", " ") == "    return 1"  # training put nothing there
    assert without_join("Q: ", " yes", " ") == " yes"
    assert without_join("Q", "->yes", "->") == "yes"
    assert without_join("Q", " yes", "") == " yes"


def test_rows_are_read_as_the_run_read_them(tmp_path: Path) -> None:
    """Without their completions, instruction and context would look like another layout."""
    row = {"instruction": "Do", "context": "it", "response": "R"}
    options = DataOptions(str(write(tmp_path / "train.jsonl", jsonl([row]))))
    file = write(tmp_path / "new.jsonl", jsonl([{"instruction": "Do", "context": "it"}]))
    layout = dataset.read_layout(options)
    assert find_layout(file, options, layout) is layout
    [prompt] = NewRows(file, options, layout, "prediction")
    assert prompt.text == "Do\n\nInput:\nit\n\nAnswer:" == read_file(Path(options.data))[0][0].prompt
    turns = [{"role": "user", "content": "a"}]
    file = write(tmp_path / "turns.jsonl", jsonl([{"prompt": turns}]))
    [prompt] = NewRows(file, options, find_layout(file, options, layout), "prediction")
    assert prompt.text == "User: a\nAssistant:"


def test_many_rows_take_the_memory_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def rows() -> Iterator[Prompt]:
        nonlocal read
        for _ in range(100_000):
            read += 1
            yield Prompt("p", {"prompt": "p"}, "")

    written = 0
    for window in windows(rows(), 16):
        written += len(window)
        assert read == written and len(window) <= 16 * predict.WINDOW_BATCHES
    assert written == 100_000
    monkeypatch.setattr(predict, "WINDOW_CHARACTERS", 50)
    long = [Prompt("p", {"prompt": "p", "other": "x" * 30}, "")] * 5
    assert [len(window) for window in windows(long, 16)] == [2, 2, 1]


# Interruptions


@pytest.mark.parametrize("sampling", [[], ["--temperature", 1.2, "--seed", 3]])
@pytest.mark.parametrize("calls", [1, 3, 6])
def test_an_interrupted_file_is_continued(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: list[Any], calls: int
) -> None:
    monkeypatch.setattr(predict, "WINDOW_BATCHES", 3)
    file = write(tmp_path / "new.jsonl", jsonl(new_rows(30)))
    arguments = [run, "--predict", file, *PLAIN, *sampling, "--out"]
    assert evaluate(*arguments, tmp_path / "whole.jsonl").code == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()

    generate, count = predict.generate, 0

    def interrupted(*given: Any, **settings: Any) -> list[list[int]]:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return generate(*given, **settings)

    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(predict, "generate", interrupted)
        assert evaluate(*arguments, out).code == 130
    kept = out.read_bytes()
    assert whole.startswith(kept) and (kept == b"" or kept.endswith(b"\n")) and len(kept) < len(whole)
    assert calls == 1 or kept.count(b"\n") >= 1
    out.write_bytes(whole[: len(kept) + 25])  # a half-written line
    ended = evaluate(*arguments, out)
    assert ended.code == 0 and out.read_bytes() == whole, ended.err
    if kept:
        assert f"; {kept.count(bytes([10]))} of them are in {out} already" in ended.err
    again = evaluate(*arguments, out)
    assert again.code == 0 and out.read_bytes() == whole and "0 predictions written" in again.err


def test_the_real_script_is_killed_and_continued(run: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "new.jsonl", jsonl(new_rows(100)))
    arguments = [run, "--predict", file, *PLAIN, "--batch", 2, "--max-new-tokens", 20, "--out"]
    out = tmp_path / "out.jsonl"
    script = subprocess.Popen(command("eval.py", *arguments, out), stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    until = time.monotonic() + 100
    while time.monotonic() < until and not (out.exists() and out.stat().st_size):
        time.sleep(0.01)
    script.kill()
    script.wait()
    assert 0 < out.read_bytes().count(b"\n") < 100
    assert evaluate(*arguments, out).code == 0
    assert evaluate(*arguments, tmp_path / "whole.jsonl").code == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_file_of_something_else_is_left_alone(run: Path, tmp_path: Path) -> None:
    rows = new_rows(4)
    file, out = write(tmp_path / "new.jsonl", jsonl(rows)), tmp_path / "out.jsonl"
    arguments = [run, "--predict", file, *PLAIN, "--out"]
    assert evaluate(*arguments, out).code == 0
    lines = out.read_bytes().splitlines(keepends=True)
    for content, word in (
        (b"years of work", "out.jsonl:1"), (b"years of work\n", "out.jsonl:1"), (lines[1], "out.jsonl:1"),
        (lines[0] + lines[2], "out.jsonl:2"), (b"".join(lines) + lines[0], "more rows"),
    ):  # fmt: skip
        out.write_bytes(content)
        assert_one_line(evaluate(*arguments, out), word, "name another --out")
        assert out.read_bytes() == content
    assert_one_line(evaluate(*arguments, file), "name another")
    assert rows_of(file) == rows
    assert_one_line(evaluate(*arguments, tmp_path), str(tmp_path), "cannot be written")
    assert_one_line(evaluate(*arguments, tmp_path / "nowhere" / "out.jsonl"), "nowhere", "cannot be written")


# Bad input

BAD: dict[str, tuple[list[Any], list[Any], list[str]]] = {
    "a row without a prompt": ([{"prompt": "a"}, {"id": 1}], [], ["new.jsonl:2", "'prompt'", "mend or remove"]),
    "a blank prompt": ([{"prompt": " "}], [], ["new.jsonl:1", "empty"]),
    "a prediction that is there": (
        [{"prompt": "a"}, {"prompt": "b", "prediction": "c"}], [],
        ["new.jsonl:2", "'prediction'", "--prediction-field"]),
    "text alone": ([{"text": "Once"}], [], ["text alone", "--prompt-field", "--prompt TEXT"]),
    "unknown fields": ([{"x": "y"}], [], ["new.jsonl", "'x'", "--prompt-field"]),
    "no rows": ([], [], ["new.jsonl", "no usable row"]),
    "no room": ([{"prompt": "a"}], ["--max-new-tokens", 96], ["--max-new-tokens 96", "lower"]),
    "two models": ([{"prompt": "a"}], ["--adapter", "other"], ["one folder"]),
    "with scores": ([{"prompt": "a"}], ["--json"], ["--json", "--predict"]),
    "with a prompt": ([{"prompt": "a"}], ["--prompt", "a"], ["--prompt", "--predict"]),
    "rows left out": ([{"prompt": "a"}], ["--skip-bad"], ["--skip-bad", "every row"]),
    "a wrong template": ([{"prompt": "a"}], ["--template", "{a"], ["--template", "lone {"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_in_one_line(run: Path, tmp_path: Path, name: str) -> None:
    rows, options, words = BAD[name]
    file = write(tmp_path / "new.jsonl", jsonl(rows))
    assert_one_line(evaluate(run, "--predict", file, "--out", tmp_path / "out.jsonl", *PLAIN, *options), *words)
    assert not (tmp_path / "out.jsonl").exists()


def test_predict_flags_that_need_another(run: Path, tmp_path: Path) -> None:
    assert_one_line(evaluate(run, "--out", tmp_path / "x"), "--out", "--predict")
    assert_one_line(evaluate(run, "--predict", tmp_path / "nowhere.jsonl"), "nowhere.jsonl", "no such file")
    assert_one_line(evaluate(run, "--raw"), "--raw", "--prompt")


def test_text_alone_has_no_prompts(model_folder: Path, tmp_path: Path, texts: tuple[str, ...]) -> None:
    data = write(tmp_path / "texts.jsonl", jsonl([{"text": text} for text in texts * 5]))
    run = train_run(tmp_path / "run", model_folder, data)
    file = write(tmp_path / "new.jsonl", jsonl([{"text": "Once"}]))
    assert_one_line(evaluate(run, "--predict", file, *PLAIN), "text alone", "'text'")
    ended = evaluate(run, "--prompt", "Once", *PLAIN)
    assert ended.code == 0 and "without a template" in ended.err
    named = evaluate(run, "--predict", file, "--prompt-field", "text", *PLAIN)
    assert named.code == 0 and json.loads(named.out)["text"] == "Once"


def test_other_fields_survive_as_they_are(run: Path, tmp_path: Path) -> None:
    row = '{"prompt": "a", "half": "\\ud800", "deep": [[{"x": [1e-3, true]}]], "\\u00e9": "\u4e2d"}\n'
    file, out = write(tmp_path / "new.jsonl", row), tmp_path / "out.jsonl"
    for _ in range(2):  # the second time the row is there already
        ended = evaluate(run, "--predict", file, "--out", out, *PLAIN)
        assert ended.code == 0, ended.err
        [predicted] = rows_of(out)
        assert predicted.pop("prediction") is not None and predicted == json.loads(row)


def test_standard_input_may_be_packed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    packed = gzip.compress(jsonl(new_rows(2)).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(packed)))
    ended = evaluate(run, "--predict", "-", *PLAIN)
    assert ended.code == 0 and ended.out.count("\n") == 2
