"""eval.py as its users run it: scores, forgetting, texts, and a plain GPT-2 that transformers loads."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from scripts import MODES, QUICK, evaluate, files, json_of, process, tensors, trained, write_pairs
from torch import Tensor

from minift.files import checkpoint, weights
from minift.files.weights import Base
from minift.model.generate import generate
from minift.model.gpt import GPT
from minift.model.packing import text_row
from minift.report import metrics

SCORES = {"loss", "perplexity", "token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL"}
PLAIN = ["--dtype", "fp32", "--device", "cpu", "--batch", "4", "--max-new-tokens", "6"]


pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """A short run of each mode, at a learning rate at which its texts change."""
    folder = tmp_path_factory.mktemp("runs")
    pairs = write_pairs(folder / "pairs")
    common = ["--model", model_folder, "--data", pairs, *QUICK, "--steps", 12, "--warmup-ratio", 0]
    for mode, (_, lr) in MODES.items():
        trained(*common, "--mode", mode, "--lr", lr, "--out", folder / mode)
    return {mode: folder / mode for mode in MODES}


def tuned_model(run: Path, base: Base) -> GPT:
    model = base.model.shared_copy().eval()
    checkpoint.apply_tuned(model, checkpoint.read_tuned(run, base.model.config))
    return model


@pytest.fixture
def base(model_folder: Path) -> Base:
    return weights.load(str(model_folder))


def text_logits(model: GPT, ids: list[int]) -> Tensor:
    """The logits (T, V) of one row of tokens."""
    batch = model.pack([text_row([*ids, 0])])
    return model.logits(model.hidden(batch, batch.target_positions))


@pytest.mark.parametrize("mode", MODES)
def test_json_is_one_object_with_both_models(runs: dict[str, Path], mode: str, model_folder: Path) -> None:
    before = {name: (runs[mode] / name).read_bytes() for name in files(runs[mode])}
    ended = evaluate(runs[mode], "--json", *PLAIN)
    assert ended.code == 0 and ended.err == ""
    scores = json.loads(ended.out)
    assert set(scores) == {"base", "tuned"}
    for model in scores.values():
        assert SCORES <= model.keys() and all(isinstance(model[name], float) for name in SCORES)
        assert model["general_loss"] is None and len(model["completions"]) == 6
    assert scores["tuned"]["loss"] < scores["base"]["loss"]
    low, high = scores["tuned"]["difference_intervals"]["loss"]
    assert low < scores["tuned"]["difference"]["loss"] < high
    assert scores["tuned"]["difference"]["loss"] == pytest.approx(scores["tuned"]["loss"] - scores["base"]["loss"])
    assert scores["tuned"]["completions"] != scores["base"]["completions"]
    assert {name: (runs[mode] / name).read_bytes() for name in files(runs[mode])} == before


def test_the_table_has_both_columns_and_completions(runs: dict[str, Path]) -> None:
    ended = evaluate(runs["lora"], *PLAIN, "--shown", 2)
    scores = json.loads(evaluate(runs["lora"], "--json", *PLAIN).out)
    for name in SCORES:
        line = next(line for line in ended.out.splitlines() if line.startswith(f"| {name} "))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert [cells[0], cells[2]] == [f"{scores[model][name]:.4f}" for model in ("base", "tuned")]
        if name in scores["tuned"]["difference"]:
            low, high = scores["tuned"]["difference_intervals"][name]
            assert cells[4:] == [f"{scores['tuned']['difference'][name]:+.4f}", f"{low:+.4f} to {high:+.4f}"]
        else:
            assert name in ("perplexity", "token_accuracy", "rouge1", "rouge2") and cells[1:] == ["-", cells[2], *"---"]
    assert ended.out.count("\n  reference ") == ended.out.count("\n  tuned ") == 2
    assert "lora of" in ended.out and "6 test rows" in ended.out
    assert "\n  reference " not in evaluate(runs["lora"], *PLAIN, "--shown", 0).out


def test_other_rows_and_fewer(runs: dict[str, Path], tmp_path: Path) -> None:
    one = json.loads(evaluate(runs["full"], "--json", *PLAIN, "--test-rows", 2).out)
    both = json.loads(evaluate(runs["full"], "--json", *PLAIN).out)
    assert one["base"]["completions"] == both["base"]["completions"][:2]
    other = write_pairs(tmp_path / "other", rows=3, seed=9)
    moved = json.loads(evaluate(runs["full"], "--json", *PLAIN, "--data", other).out)
    assert moved["base"]["loss"] != both["base"]["loss"]


@pytest.mark.parametrize("mode", ["full", "prompt"])
def test_forgetting(
    runs: dict[str, Path], mode: str, tmp_path: Path, texts: tuple[str, ...], base: Base
) -> None:
    (tmp_path / "general.txt").write_text("\n".join(texts), encoding="utf-8")
    ended = evaluate(runs[mode], *PLAIN, "--general", tmp_path / "general.txt")
    scores = json.loads(evaluate(runs[mode], *PLAIN, "--general", tmp_path / "general.txt", "--json").out)
    change = scores["tuned"]["general_loss"] - scores["base"]["general_loss"]
    assert scores["tuned"]["forgetting"] == change
    assert f"forgetting: {change:+.4f} nats per token on the general text" in ended.out and abs(change) > 1e-3
    assert ("is read with the soft prompt in front" in ended.out) == (mode == "prompt")
    for name, model in (("base", base.model), ("tuned", tuned_model(runs[mode], base))):
        n_positions, reserved = model.config.n_positions, tuned_model(runs[mode], base).prompt_tokens
        ids = base.tokenizer.encode("\n".join(texts)).ids
        rows = metrics.text_windows(ids, n_positions, reserved)
        with torch.no_grad():
            total = sum(model.loss(model.pack([row])).item() for row in rows)
        loss = total / sum(row.num_targets for row in rows)
        assert scores[name]["general_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_is_continued(runs: dict[str, Path], mode: str, base: Base) -> None:
    ended = evaluate(runs[mode], "--prompt", "1: the lunch =", *PLAIN)
    ids = base.tokenizer.encode("1: the lunch =").ids
    expected = base.tokenizer.decode(generate(tuned_model(runs[mode], base), [ids], 6, stop=0)[0])
    assert ended.code == 0 and ended.out == f"{expected}\n"


def test_prompt_from_standard_input(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = "1: caf\u00e9\nlunch ="
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8")), "ascii"))
    piped = evaluate(runs["lora"], "--prompt", "-", *PLAIN)
    assert piped.code == 0 and piped.out == evaluate(runs["lora"], "--prompt", text, *PLAIN).out
    alone = process("eval.py", runs["lora"], "--prompt", "-", *PLAIN, cwd=runs["lora"].parent, text=text)
    assert alone == (0, piped.out, piped.err) and "as it is" in alone.err


@pytest.fixture(scope="module")
def question_run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A run with fields, a template, a join, a table and a limit of its own; its data is beside it."""
    folder = tmp_path_factory.mktemp("questions")
    rows = "".join(f"{i}: lunch {i % 7}|meeting|{i % 3} late\n" for i in range(40))
    (folder / "qa.txt").write_text(rows)
    options = ["--delimiter", "|", "--columns", "q,kind,a", "--template", "Q: {q}\\nA:", "--completion-field", "a",
               "--join", "", "--split", "60,20,20", "--max-length", 40, "--max-new-tokens", 5]
    trained("--model", model_folder, "--data", folder / "qa.txt", *QUICK, "--steps", 4, *options, "--out",
            folder / "run")
    return folder / "run"


def test_other_data_is_read_as_the_run_read_it(question_run: Path, tmp_path: Path) -> None:
    """The same file named again, or moved, gives the same scores; flags say otherwise."""
    data = question_run.parent / "qa.txt"
    own = evaluate(question_run, "--json", *PLAIN)
    assert own.code == 0 and len(json.loads(own.out)["tuned"]["completions"]) == 8  # 20 % of 40 rows
    assert evaluate(question_run, "--json", *PLAIN, "--data", data).out == own.out
    shutil.copy(data, tmp_path / "moved.txt")
    moved = evaluate(question_run, *PLAIN, "--data", tmp_path / "moved.txt")
    assert moved.code == 0 and "moved.txt: usable rows: 40, fields q -> a, template 'Q: {q}\\\\nA:'" in moved.out

    halves = json.loads(evaluate(question_run, "--json", *PLAIN, "--split", "40,10,50").out)
    assert len(halves["tuned"]["completions"]) == 20
    for flags in (["--join", "\\n"], ["--template", "{kind} {q}:"], ["--prompt-field", "q"]):
        other = json.loads(evaluate(question_run, "--json", *PLAIN, *flags).out)
        assert other["base"]["loss"] != json.loads(own.out)["base"]["loss"], flags
    none = evaluate(question_run, "--split", "80,20,0", *PLAIN)
    assert none.code == 2 and "no test rows" in none.err and none.err.count("\n") == 1
    few = evaluate(question_run, "--rows", 3)
    assert few.code == 2 and "--test-rows" in few.err


def test_the_limit_of_new_tokens_is_the_runs(question_run: Path) -> None:
    out = evaluate(question_run, "--json", *PLAIN[:-2]).out
    assert out == evaluate(question_run, "--json", *PLAIN[:-1], 5).out
    assert out != evaluate(question_run, "--json", *PLAIN[:-1], 9).out


def test_a_prompt_is_put_into_the_template(question_run: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    placed = evaluate(question_run, "--prompt", "3: lunch", *PLAIN)
    written_out = evaluate(question_run, "--prompt", "Q: 3: lunch\nA:", "--raw", *PLAIN)
    assert placed.out == written_out.out and (written_out.code, written_out.err) == (0, "")
    assert "3: lunch" not in placed.out and "the run's template 'Q: {q}\\\\nA:'" in placed.err
    other = evaluate(question_run, "--prompt", "3: lunch", "--template", "{kind}", *PLAIN)
    assert other.out == evaluate(question_run, "--prompt", "3: lunch", "--raw", *PLAIN).out
    two = evaluate(question_run, "--prompt", "3: lunch", "--template", "{kind} {q}", *PLAIN)
    assert two.out == other.out and "taken as it is" in two.err and "kind, q" in two.err

    shutil.copytree(runs["lora"], tmp_path / "run")
    raw = json_of(tmp_path / "run" / "config.json")
    raw["data"]["data"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    gone = evaluate(tmp_path / "run", "--prompt", "1: lunch =", *PLAIN)
    assert gone.code == 0 and "taken as it is" in gone.err and "gone" in gone.err


def test_a_prompt_of_a_chat_is_the_users_turn(model_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "lunch?"}, {"role": "assistant", "content": "late"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + "".join(
        json.dumps({"messages": [{"role": "user", "content": f"lunch {i}?"}, turns[1]]}) + "\n" for i in range(12)))
    data = tmp_path / "chats.jsonl"
    trained("--model", model_folder, "--data", data, *QUICK, "--steps", 3, "--out", tmp_path / "run")
    asked = evaluate(tmp_path / "run", "--prompt", "lunch?", *PLAIN)
    written_out = evaluate(tmp_path / "run", "--prompt", "User: lunch?\nAssistant:", "--raw", *PLAIN)
    assert asked.code == 0 and asked.out == written_out.out and "user's turn" in asked.err


def test_start_tokens_go_before_a_prompt(runs: dict[str, Path], model_folder: Path, tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = weights.load(str(model_folder)).tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="A $A", special_tokens=[("A", 7)])
    shutil.copytree(model_folder, tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    base = weights.load(str(tmp_path / "base"))
    ended = evaluate(runs["lora"], "--model", tmp_path / "base", "--prompt", "1: lunch =", *PLAIN)
    ids = [7, *base.tokenizer.encode("1: lunch =", add_special_tokens=False).ids]
    assert ended.out == base.tokenizer.decode(generate(tuned_model(runs["lora"], base), [ids], 6, stop=0)[0]) + "\n"


def test_sampling(runs: dict[str, Path]) -> None:
    def text(*options: object) -> str:
        ended = evaluate(runs["lora"], "--prompt", "1: lunch =", *PLAIN[:-1], 12, *options)
        assert ended.code == 0, ended.err
        return ended.out

    greedy, warm = text(), ["--temperature", 1.5]
    assert text(*warm, "--seed", 1) == text(*warm, "--seed", 1) != greedy
    assert len({text(*warm, "--seed", seed) for seed in range(6)}) > 3
    assert text(*warm, "--top-k", 1) == text(*warm, "--top-p", 1e-6) == text("--temperature", 0) == greedy


@pytest.mark.parametrize("mode", ["full", "selective", "lora"])
def test_a_saved_folder_is_the_same_model_in_transformers(
    runs: dict[str, Path], mode: str, tmp_path: Path, base: Base
) -> None:
    from transformers import GPT2LMHeadModel

    ended = evaluate(runs[mode], "--save", tmp_path / "hf")
    assert ended.code == 0 and str(tmp_path / "hf") in ended.out
    ours = tuned_model(runs[mode], base)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
    ids = base.tokenizer.encode("1: the lunch is late, the food is cheap =").ids
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(text_logits(ours, ids), logits, atol=1e-4, rtol=1e-4)
        assert (text_logits(base.model, ids) - logits).abs().max() > 0.1
        text = theirs.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, len(ids) :]
    assert [token for token in text.tolist() if token != 0] == generate(ours, [ids], 16, stop=0)[0]
    again = weights.load(str(tmp_path / "hf"))
    assert again.tokenizer.get_vocab() == base.tokenizer.get_vocab() and again.model.config == ours.config


@pytest.mark.parametrize("mode, reason", [("prompt", "extra input"), ("adapter", "not linear")])
def test_what_cannot_be_merged_is_not_saved(
    runs: dict[str, Path], mode: str, reason: str, tmp_path: Path
) -> None:
    ended = evaluate(runs[mode], "--save", tmp_path / "hf")
    assert ended.code == 2 and "cannot be merged" in ended.err and reason in ended.err
    assert ended.err.count("\n") == 1 and not (tmp_path / "hf").exists()
    assert "--predict FILE" in ended.err and ("--save-peft DIR" in ended.err) == (mode == "prompt")


def test_saving_overwrites_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for folder, words in (("mine", "not empty"), ("mine/thesis.txt", "not empty"), ("mine/thesis.txt/x", "")):
        ended = evaluate(runs["full"], "--save", tmp_path / folder)
        assert ended.code == 2 and ended.err.count("\n") == 1 and words in ended.err
    assert list(files(tmp_path)) == ["mine", "mine/thesis.txt"]


def test_describe(runs: dict[str, Path]) -> None:
    lines = evaluate(runs["prompt"], "--describe", *PLAIN).out.splitlines()
    assert len(lines) == 20 and all("nearest" in line for line in lines)
    lines = evaluate(runs["lora"], "--describe", *PLAIN).out.splitlines()
    assert len(lines) == len(tensors(runs["lora"] / "tuned.safetensors"))
    assert any(line.startswith("h.0.attn.c_attn.lora_A (24, 24) norm ") for line in lines)


def test_the_base_may_be_elsewhere(runs: dict[str, Path], tmp_path: Path, model_folder: Path) -> None:
    shutil.copytree(runs["lora"], tmp_path / "run")
    raw = json_of(tmp_path / "run" / "config.json")
    raw["train"]["model"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.json").write_text(json.dumps(raw))
    ended = evaluate(tmp_path / "run", "--json", *PLAIN)
    assert ended.code == 2 and "gone" in ended.err
    shutil.copytree(model_folder, tmp_path / "moved")
    moved = evaluate(tmp_path / "run", "--json", *PLAIN, "--model", tmp_path / "moved")
    assert moved.out == evaluate(runs["lora"], "--json", *PLAIN).out


def test_help_of_eval(tmp_path: Path) -> None:
    ended = evaluate("--help")
    assert ended.code == 0 and "--general" in ended.out and "usage: eval.py" in ended.out


def test_several_runs_go_through_one_after_another(runs: dict[str, Path]) -> None:
    """Each scores and writes what it does alone, beside one base."""
    both = ["--adapter", runs["lora"], "--adapter", runs["prompt"]]
    scores = json.loads(evaluate(*both, "--json", *PLAIN).out)
    assert list(scores) == ["base", str(runs["lora"]), str(runs["prompt"])]
    for mode in ("lora", "prompt"):
        alone = json.loads(evaluate(runs[mode], "--json", *PLAIN).out)
        assert scores[str(runs[mode])] == alone["tuned"] and scores["base"] == alone["base"]
    table = evaluate(*both, *PLAIN, "--shown", 1).out
    assert [line.split()[1] for line in table.splitlines() if line.startswith("| ")][1:] == [
        "base", str(runs["lora"]), str(runs["prompt"])]
    texts = evaluate(*both, *PLAIN, "--prompt", "1: lunch =").out
    for mode in ("lora", "prompt"):
        assert f"{runs[mode]}: {evaluate(runs[mode], *PLAIN, '--prompt', '1: lunch =').out}" in texts
    ended = evaluate(*both, "--save", runs["lora"] / "x")
    assert ended.code == 2 and "give them one folder" in ended.err
