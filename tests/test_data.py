"""Pairs, tokens and batches, against files that json and csv wrote and a tokenizer made on the spot."""

import csv
import itertools
import json
import random
import statistics
import tracemalloc
from pathlib import Path

import pytest
import tokenizers
import torch

from minift.data.dataset import (
    DataOptions,
    Example,
    Pair,
    batches,
    collate,
    encode,
    length_report,
    read_pairs,
    tokenize,
)
from minift.data.pairs import MAX_LINE_BYTES, parse_template, read_file
from minift.errors import UserError

EOS = 256


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and end-of-text: lengths can be counted by hand."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == EOS
    return tokenizer


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(start, start + count)]


def texts(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.prompt, pair.completion) for pair in pairs]


def example(n_prompt: int, n_completion: int, start: int = 1) -> Example:
    ids = list(range(start, start + n_prompt + n_completion)) + [EOS]
    return Example(ids, n_prompt, Pair("p", "c", f"x:{start}"))


# Formats

AWKWARD = [
    ("plain", "text"),
    ("comma, quote \" and\ttab", "a \"quoted\" word"),
    ("two\nlines", "three\r\nline\rends"),
    ("separators \u2028 and \u0085 end no line", "\u00e9\u4e2d\U0001f600"),
    ("'single' || {braces} \\n", "%s {0} {x.y}"),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".JSONL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_formats_give_back_what_json_and_csv_wrote(tmp_path, suffix, mark, line_end):
    path = tmp_path / f"rows{suffix}"
    rows = [{"prompt": prompt, "other": "x", "completion": completion} for prompt, completion in AWKWARD]
    if suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            file.write(mark)
            writer = csv.DictWriter(file, rows[0], delimiter="," if suffix == ".csv" else "\t",
                                    lineterminator=line_end)
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
        write(path, mark + text.replace("\n", line_end))
    else:
        lines = [json.dumps(row, ensure_ascii=False) + line_end for row in rows]
        write(path, mark + line_end.join(lines))  # blank lines between rows are no rows
    pairs, notes = read_file(path)
    assert texts(pairs) == AWKWARD
    assert len(notes) == 1 and "5" in notes[0] and "prompt -> completion" in notes[0]


def test_places_are_those_of_an_editor(tmp_path):
    """Rows that begin on lines 2, 5 and 7 of a CSV file, the third row of a JSON list, line 3 of JSONL."""
    table = write(tmp_path / "a.csv", 'prompt,completion\n"one\ntwo\r\nthree",x\n"four\n",y\nfive,z\n')
    assert [pair.where for pair in read_file(table)[0]] == ["a.csv:2", "a.csv:5", "a.csv:7"]
    items = write(tmp_path / "b.json", json.dumps(numbered(3), indent=4))
    assert read_file(items)[0][2].where == "b.json: row 3"
    lines = write(tmp_path / "c.jsonl", "\n\n" + jsonl(numbered(1)))
    assert read_file(lines)[0][0].where == "c.jsonl:3"


def test_e2e_text_parts_at_the_first_bars(tmp_path):
    path = write(tmp_path / "test.txt", "name : A | area : B||There is A . \r\n\r\nname : C||both || and\n")
    pairs, _ = read_file(path)
    assert texts(pairs) == [
        ("name : A | area : B\n\nText:", "There is A ."),
        ("name : C\n\nText:", "both || and"),
    ]


def test_csv_fields_may_be_long(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\n" + "x" * 1_000_000 + ",y\n")
    assert texts(read_file(path)[0]) == [("x" * 1_000_000, "y")]


def test_old_line_ends_and_raw_control_characters_are_read(tmp_path):
    table = write(tmp_path / "a.csv", "prompt,completion\rone,1\rtwo,2\r")
    assert texts(read_file(table)[0]) == [("one", "1"), ("two", "2")]
    lines = write(tmp_path / "a.jsonl", '{"prompt": "raw\rreturn\tand tab", "completion": "x"}\r\n')
    assert texts(read_file(lines)[0]) == [("raw\rreturn\tand tab", "x")]


# Layouts and templates

LAYOUTS = {
    "prompt": ({"prompt": "P ", "completion": " C\n"}, "P ", "C"),
    "prompt wins": ({"dialogue": "D", "summary": "S", "prompt": "P", "completion": "C"}, "P", "C"),
    "with input": (
        {"instruction": "Do", "input": "it", "output": "done"}, "Do\n\nInput:\nit\n\nAnswer:", "done"),
    "blank input": ({"instruction": "Do", "input": " ", "output": "done"}, "Do\n\nAnswer:", "done"),
    "no input": ({"instruction": "Do", "output": "done"}, "Do\n\nAnswer:", "done"),
    "null input": ({"instruction": "Do", "input": None, "output": "done"}, "Do\n\nAnswer:", "done"),
    "samsum": ({"id": 3, "dialogue": "A: hi", "summary": "S"}, "A: hi\n\nSummary:", "S"),
    "e2e": ({"mr": "name : A", "ref": "R"}, "name : A\n\nText:", "R"),
    "context": ({"context": "C", "completion": "R"}, "C", "R"),
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Bye\n"},
                      {"role": "assistant", "content": " Bye. "}]},
        "System: Be brief.\nUser: Hi\nAssistant: Yes?\nUser: Bye\nAssistant:", "Bye."),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_known_layouts(tmp_path, name):
    row, prompt, completion = LAYOUTS[name]
    pairs, notes = read_file(write(tmp_path / "train.jsonl", jsonl([row])))
    assert texts(pairs) == [(prompt, completion)]
    assert notes[0].startswith("train.jsonl: usable rows: 1, field")


def test_the_layout_is_said(tmp_path):
    row = LAYOUTS["samsum"][0]
    _, notes = read_file(write(tmp_path / "train.jsonl", jsonl([row])))
    assert notes == [
        r"train.jsonl: usable rows: 1, fields dialogue -> summary, template '{dialogue}\n\nSummary:'"
    ]


FLAGS = {
    "both fields": (dict(prompt_field="q", completion_field="a"), "Q", "A"),
    "template": (dict(template="{q} {{x}}\\n{prompt}:", completion_field="a"), "Q {x}\nP:", "A"),
    "field in template": (dict(prompt_field="q", template="<{q}>", completion_field="a"), "<Q>", "A"),
    "prompt field on a known layout": (dict(prompt_field="q"), "Q", "C"),
    "completion field on a known layout": (dict(completion_field="a"), "P", "A"),
    "template on a known layout": (dict(template="{prompt}!"), "P!", "C"),
    "name with spaces": (dict(prompt_field="long name", completion_field="a"), "L", "A"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_flags_override_the_layout(tmp_path, name):
    flags, prompt, completion = FLAGS[name]
    row = {"prompt": "P", "completion": "C", "q": "Q", "a": "A", "long name": "L"}
    path = write(tmp_path / "rows.jsonl", jsonl([row]))
    assert texts(read_file(path, **flags)[0]) == [(prompt, completion)]


def test_an_overridden_completion_keeps_the_optional_input(tmp_path):
    rows = [{"instruction": "Do", "output": "x", "short": "y"}]
    path = write(tmp_path / "rows.jsonl", jsonl(rows))
    assert texts(read_file(path, completion_field="short")[0]) == [("Do\n\nAnswer:", "y")]


BAD_TEMPLATES = [
    "{dialogue.__class__}", "{dialogue[0]}", "{dialogue!r}", "{dialogue:>10}", "{dialogue:}", "{}", "{0}",
    "{1dialogue}", "{dialogue", "dialogue}", "{{dialogue}", "{dialogue}}", "{ dialogue}", "{{{dialogue",
    "{dia{x}logue}", "{dialogue}\udcff",
]  # fmt: skip


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_a_template_is_data(tmp_path, template):
    path = write(tmp_path / "rows.jsonl", jsonl([{"dialogue": "D", "summary": "S"}]))
    with pytest.raises(UserError, match="^--template .*(lone|plain field name|UTF-8)"):
        read_file(path, template=template)


def test_doubled_braces_are_those_of_str_format():
    generator = random.Random(0)
    for _ in range(300):
        template = "".join(generator.choices(["{{", "}}", "{x}", "t", " "], k=generator.randrange(1, 9)))
        filled = "".join("VALUE" if is_field else part for part, is_field in parse_template(template))
        assert filled == template.format(x="VALUE")


def test_a_value_is_never_a_template(tmp_path):
    path = write(tmp_path / "rows.jsonl", jsonl([{"dialogue": "{summary} {0.x}\\n", "summary": "S"}]))
    assert read_file(path)[0][0].prompt == "{summary} {0.x}\\n\n\nSummary:"


BAD_FLAGS = {
    "unknown layout": ({"q": "x", "a": "y"}, {}, "rows.jsonl: which of its fields 'q', 'a' .*--prompt-field"),
    "no completion": ({"q": "x", "a": "y"}, {"prompt_field": "q"}, "which .*--completion-field"),
    "no prompt": ({"q": "x", "a": "y"}, {"completion_field": "a"}, "which of its fields"),
    "unknown field": ({"q": "x", "a": "y"}, {"prompt_field": "z", "completion_field": "a"}, "no field 'z'"),
    "unknown completion": ({"prompt": "x", "completion": "y"}, {"completion_field": "z"}, "no field 'z'"),
    "unknown in template": ({"mr": "x", "ref": "y"}, {"template": "{mr}{z}"}, "'z', there are 'mr', 'ref'"),
    "no field": ({"mr": "x", "ref": "y"}, {"template": "Say:"}, "'Say:' uses no field"),
    "the answer": ({"mr": "x", "ref": "y"}, {"template": "{mr} {ref}"}, "holds the completion's field 'ref'"),
    "the same": ({"mr": "x", "ref": "y"}, {"prompt_field": "ref"}, "holds the completion's field 'ref'"),
    "contradiction": ({"mr": "x", "ref": "y"}, {"prompt_field": "mr", "template": "{ref}"}, "does not use"),
    "chat": ({"messages": [], "x": "y"}, {"prompt_field": "x"}, "which of its fields 'messages', 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_wrong_fields_are_refused_whatever_skip_bad_says(tmp_path, name):
    row, flags, message = BAD_FLAGS[name]
    path = write(tmp_path / "rows.jsonl", jsonl([row]))
    for skip_bad in (False, True):
        with pytest.raises(UserError, match=message):
            read_file(path, skip_bad=skip_bad, **flags)


# Bad rows and hostile files

GOOD = b'{"prompt": "p", "completion": "c"}\n'
DEEP = b"[" * 100_000 + b"]" * 100_000
BAD_LINES = {
    "cut off": (b'{"prompt": "p", "comp\n', "not valid JSON: Unterminated string"),
    "not an object": (b'["p", "c"]\n', "the row is a list, and must be an object"),
    "bare null": (b"null\n", "the row is null"),
    "two objects": (GOOD.strip() + GOOD, r"not valid JSON: Extra data \(column 35\)"),
    "deep": (b'{"prompt": ' + DEEP + b"}\n", "nested too deeply"),
    "endless number": (b'{"prompt": ' + b"9" * 5000 + b"}\n", "digits"),
    "field given twice": (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', "same field twice"),
    "number": (b'{"prompt": 3, "completion": "c"}\n', "field 'prompt' is a number, and must be text"),
    "null": (b'{"prompt": "p", "completion": null}\n', "field 'completion' is null"),
    "list": (b'{"prompt": ["p"], "completion": "c"}\n', "field 'prompt' is a list"),
    "object": (b'{"prompt": {"a": 1}, "completion": "c"}\n', "field 'prompt' is an object"),
    "missing": (b'{"prompt": "p", "output": "c"}\n', "no field 'completion', the row has 'prompt', 'output'"),
    "half a character": (b'{"prompt": "\\ud800", "completion": "c"}\n', "surrogate"),
    "not UTF-8": (b'{"prompt": "caf\xe9", "completion": "c"}\n', r"byte 16 \(0xe9\) is not UTF-8"),
    "NUL": (b'{"prompt": "a\0", "completion": "c"}\n', "byte 14 is NUL"),
    "too long": (b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}\n', "more than 16 MiB in one line"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_placed_or_skipped_and_counted(tmp_path, name):
    line, message = BAD_LINES[name]
    path = write(tmp_path / "train.jsonl", GOOD + b"\r\n" + line + GOOD)
    with pytest.raises(UserError, match=f"train.jsonl:3: .*{message}.*--skip-bad") as caught:
        read_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    pairs, notes = read_file(path, skip_bad=True)
    assert [pair.where for pair in pairs] == ["train.jsonl:1", "train.jsonl:4"]
    assert notes[1].startswith("train.jsonl: malformed rows skipped: 1, train.jsonl:3: ")


BAD_MESSAGES = {
    "no list": ("hello", "must be a list of objects"),
    "empty": ([], "must be a list of objects"),
    "texts": (["hello"], "must be a list of objects"),
    "last is the user's": ([{"role": "user", "content": "x"}], "the last of 'messages' is the user's"),
    "unknown role": ([{"role": "tool", "content": "x"}], "role 'tool'"),
    "role no text": ([{"role": [1], "content": "x"}], "field 'role' is a list"),
    "content no text": ([{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
                        "field 'content' is null"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(tmp_path, name):
    turns, message = BAD_MESSAGES[name]
    path = write(tmp_path / "chat.jsonl", jsonl([LAYOUTS["messages"][0], {"messages": turns}]))
    with pytest.raises(UserError, match=f"chat.jsonl:2: .*{message}"):
        read_file(path)


def test_at_most_three_bad_rows_are_named(tmp_path):
    _, notes = read_file(write(tmp_path / "a.jsonl", b"x\n" * 5 + GOOD), skip_bad=True)
    assert "skipped: 5, a.jsonl:1: " in notes[1] and "a.jsonl:3: " in notes[1] and "a.jsonl:4" not in notes[1]


def test_empty_sides_are_dropped_and_counted(tmp_path):
    rows = [{"dialogue": dialogue, "summary": summary}
            for dialogue, summary in [("D", "S"), (" \n", "S"), ("D", ""), ("", "S"), ("E", " ")]]
    pairs, notes = read_file(write(tmp_path / "a.jsonl", jsonl(rows)))
    assert texts(pairs) == [("D\n\nSummary:", "S")]
    assert notes[1:] == ["a.jsonl: rows dropped for an empty prompt: 2, first a.jsonl:2",
                         "a.jsonl: rows dropped for an empty completion: 2, first a.jsonl:3"]


CSV_HEAD = b"prompt,completion\n"
BAD_FILES = {
    "empty.jsonl": (b"", "no usable row, the file holds none"),
    "mark.jsonl": (b"\xef\xbb\xbf", "no usable row, the file holds none"),
    "blank.txt": (b"\n\n \n", "no usable row, the file holds none"),
    "head.csv": (CSV_HEAD, "no usable row, the file holds none"),
    "empty.json": (b"", "not valid JSON"),
    "none.json": (b"[]", "no usable row"),
    "unusable.jsonl": (b'{"prompt": "", "completion": "c"}\n', "no usable row, .*prompt: 1, first unus"),
    "utf16.jsonl": (GOOD.decode().encode("utf-16"), "this is UTF-16, convert it to UTF-8"),
    "utf16be.csv": (b"\xfe\xff" + CSV_HEAD.decode().encode("utf-16-be"), "this is UTF-16"),
    "utf32.json": (GOOD.decode().encode("utf-32"), "this is UTF-32"),
    "utf32be.txt": (b"\0\0\xfe\xff" + b"\0\0\0a", "this is UTF-32"),
    "bare16.jsonl": (GOOD.decode().encode("utf-16-le"), "bare16.jsonl:1: byte 2 is NUL"),
    "binary.json": (bytes(range(256)), "binary.json:1: byte 1 is NUL"),
    "latin.json": (b'[{"prompt": "a",\n"completion": "\xe9"}]', r"latin.json:2: byte 16 \(0xe9\) is not"),
    "lines.json": (GOOD + GOOD, "must be a list of objects; if each line is an object, name the file .jsonl"),
    "text.json": (b'"hello"', "text, and must be a list of objects"),
    "deep.json": (DEEP, "nested too deeply"),
    "cut.json": (b'[{"prompt": "p",\n "completion": "c"},\n', r"not valid JSON: .*\(line 3 column 1\)"),
    "row.json": (b"[" + GOOD + b", 7]", "row.json: row 2: the row is a number"),
    "bars.txt": (b"a||b\nno bars\n", "bars.txt:2: no || between prompt and completion".replace("|", r"\|")),
    "twice.csv": (b"prompt,completion,prompt\n", "twice.csv:1: the header names a field twice"),
    "short.csv": (CSV_HEAD + b'"a\nb",c\nd\n', "short.csv:4: 1 fields, and the header has 2"),
    "long.csv": (CSV_HEAD + b"a,b,c\n", "long.csv:2: 3 fields, and the header has 2"),
    "quote.csv": (CSV_HEAD + b'a,b\n"open,c\nd,e\n', "quote.csv:3: .*not valid CSV.*line 4; .*quote"),
    "after.csv": (CSV_HEAD + b'"a"x,b\nc,d\n', "after.csv:2: not valid CSV"),
    "nul.csv": (CSV_HEAD + b"a,b\nc\0,d\n", "nul.csv:3: byte 2 is NUL"),
    "latin.tsv": (b"prompt\tcompletion\ncaf\xe9\tx\n", r"latin.tsv:2: byte 4 \(0xe9\) is not UTF-8"),
    "rows.parquet": (b"PAR1", "unknown kind of file '.parquet', known are .jsonl"),
    "noname": (GOOD, "unknown kind of file ''"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gives_one_clear_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as caught:
        read_pairs(DataOptions(data=str(path)), seed=0)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_csv_goes_on_where_rows_are_certain(tmp_path):
    path = write(tmp_path / "a.csv", CSV_HEAD + b'"a"x,b\nc\nd,e\n')
    pairs, notes = read_file(path, skip_bad=True)
    assert texts(pairs) == [("d", "e")] and "skipped: 2, a.csv:2: " in notes[1]
    with pytest.raises(UserError, match="a.csv:2: .*unclosed quote"):
        read_file(write(path, CSV_HEAD + b'"open,b\nc,d\n'), skip_bad=True)


def test_a_line_without_end_is_refused_without_reading_it(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.txt", "a.json"):
        path = write(tmp_path / name, "[")
        with open(path, "r+b") as file:
            file.truncate(2**30)  # sparse: the file takes no room on the disk
        tracemalloc.start()
        with pytest.raises(UserError, match="more than .* MiB"):
            read_file(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * MAX_LINE_BYTES


def test_mutated_files_are_read_or_refused(tmp_path):
    """2,000 seeded mutations: every outcome is rows of text or one line of UserError."""
    generator = random.Random(0)
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in AWKWARD]
    table = "prompt,completion\n" + "".join(f'"{p}","{c}"\n' for p, c in [("a\nb", "c"), ("d", 'e""f')])
    seeds = {"a.jsonl": jsonl(rows), "a.json": json.dumps(rows), "a.csv": table, "a.txt": "a||b\nc||d\n"}
    for turn in range(2000):
        name = generator.choice(list(seeds))
        content = bytearray(seeds[name].encode())
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(content))
            other = bytes([generator.randrange(256)])
            content[at : at + generator.randrange(3)] = generator.choice(
                [b"", b'"', b"\r", b"\n", b"\\", b"{", b"]", b",", b"\xff", b"\0", other])
        path = write(tmp_path / name, bytes(content))
        try:
            pairs, _ = read_file(path, skip_bad=turn % 2 == 0)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(prompt.encode() and completion.encode() for prompt, completion in texts(pairs))


def test_missing_files_and_folders(tmp_path):
    for data, message in [("", "no data"), (None, "no data"), (str(tmp_path / "x.jsonl"), "no such file"),
                          ("/dev/null", "not a file"), ("x" * 5000, "no such file"),
                          ("a\0b", "no such file")]:
        with pytest.raises(UserError, match=message):
            read_pairs(DataOptions(data=data), seed=0)


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
    rows = numbered(500)
    first = split_file(tmp_path, rows)
    assert first == split_file(tmp_path, rows)
    assert texts(first.test) != texts(split_file(tmp_path, rows, seed=1).test)
    random.Random(0).shuffle(rows)
    more = split_file(tmp_path, rows + numbered(500, start=500))
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
    with pytest.raises(UserError, match=r"rows.jsonl: too few .*\(2\) for train \+ val \+ test: add rows"):
        split_file(tmp_path, numbered(2) * 10)
    pairs = split_file(tmp_path, numbered(2), split="90,0,10")
    assert (len(pairs.train), len(pairs.val), len(pairs.test)) == (1, 0, 1)
    assert len(split_file(tmp_path, numbered(1), split="100,0,0").train) == 1


@pytest.mark.parametrize("split", ["", "80", "80,20", "80,10,10,0", "80,10,5", "a,b,c", "110,-10,0",
                                   "nan,50,50", "0,50,50", "80 10 10", "1e999,0,0"])  # fmt: skip
def test_a_malformed_split_is_refused(tmp_path, split):
    with pytest.raises(UserError, match="^--split "):
        split_file(tmp_path, numbered(10), split=split)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Valid"])
def test_a_folder_names_its_splits(tmp_path, name):
    write(tmp_path / "train.jsonl", jsonl(numbered(5)))
    write(tmp_path / f"{name}.json", json.dumps(numbered(3, start=5)))
    write(tmp_path / "test.csv", "prompt,completion\nq,a\n")
    write(tmp_path / "README.md", "not data")
    pairs = read_pairs(DataOptions(data=str(tmp_path)), seed=0)
    assert texts(pairs.train) == [(f"question {i}", f"answer {i}") for i in range(5)]
    assert (len(pairs.val), texts(pairs.test)) == (3, [("q", "a")])
    assert [note.split(":")[0] for note in pairs.notes] == ["train.jsonl", f"{name}.json", "test.csv"]


def test_what_a_folder_lacks_is_cut_out_of_train(tmp_path):
    write(tmp_path / "train.jsonl", jsonl(numbered(200)))
    write(tmp_path / "test.jsonl", jsonl(numbered(7, start=200)))
    pairs = read_pairs(DataOptions(data=str(tmp_path)), seed=0)
    assert len(pairs.test) == 7 and 8 <= len(pairs.val) <= 32
    whole = [(row["prompt"], row["completion"]) for row in numbered(200)]
    assert sorted(texts(pairs.train + pairs.val)) == sorted(whole)
    assert pairs.notes[-1].startswith("train.jsonl: split by a hash of the prompt, rows: train 1")
    assert not read_pairs(DataOptions(data=str(tmp_path), split="100,0,0"), seed=0).val


def test_folders_that_are_refused(tmp_path):
    options = DataOptions(data=str(tmp_path))
    with pytest.raises(UserError, match="no train.jsonl .*there is no file of pairs"):
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
    assert notes[-3:] == ["val: 2 of its 5 different prompts also stand in train",
                          "test: 1 of its 4 different prompts also stand in train",
                          "test: 4 of its 4 different prompts also stand in val"]


def test_rows_limits_the_training_rows_alone(tmp_path):
    whole, part = split_file(tmp_path, numbered(100)), split_file(tmp_path, numbered(100), rows=7)
    assert part.train == whole.train[:7] and (part.val, part.test) == (whole.val, whole.test)
    assert part.notes[-1] == f"train: the first 7 of {len(whole.train)} rows (--rows)"
    for rows in (0, -1):
        with pytest.raises(UserError, match=f"--rows {rows}: must be 1 or more"):
            split_file(tmp_path, numbered(100), rows=rows)


# Tokens


def test_a_row_is_prompt_completion_and_end_of_text():
    tokenizer = byte_tokenizer()
    pairs = [Pair("Q:", "yes", "x:1"), Pair("Q:\n", "yes", "x:2"), Pair("\u00e9", "\u4e2d", "x:3")]
    examples, cut = encode(pairs, tokenizer, EOS, 100)
    for found, whole in zip(examples, ["Q: yes", "Q:\nyes", "\u00e9 \u4e2d"], strict=True):
        assert found.ids[-1] == EOS and tokenizer.decode(found.ids[:-1]) == whole
        assert tokenizer.decode(found.ids[: found.n_prompt]) == found.pair.prompt
    assert cut == 0 and [found.pair for found in examples] == pairs


def test_long_prompts_lose_their_beginning_and_completions_nothing():
    tokenizer = byte_tokenizer()
    generator = random.Random(0)

    def letters(alphabet: str) -> str:
        return "".join(generator.choices(alphabet, k=generator.randrange(1, 40)))

    pairs = [Pair(letters("abc"), letters("xyz"), f"x:{i}") for i in range(500)]
    examples, cut = encode(pairs, tokenizer, EOS, 30)
    fitting = [pair for pair in pairs if len(pair.completion) + 3 <= 30]  # space, end, a prompt token
    assert [found.pair for found in examples] == fitting and len(fitting) < len(pairs)
    for found in examples:
        assert len(found.ids) == min(30, len(found.pair.prompt) + len(found.pair.completion) + 2)
        assert found.n_prompt >= 1
        assert found.pair.prompt.endswith(tokenizer.decode(found.ids[: found.n_prompt]))
        assert tokenizer.decode(found.ids[found.n_prompt : -1]) == " " + found.pair.completion
        assert found.ids[-1] == EOS
    assert cut == sum(len(pair.prompt) + len(pair.completion) + 2 > 30 for pair in fitting)
    report = length_report("train", pairs, examples, cut, EOS)
    lengths = [len(found.ids) for found in examples]
    first = next(pair for pair in pairs if pair not in fitting)
    assert f"train: {len(examples)} rows, tokens median {statistics.median_low(lengths)} / 95 % " in report
    assert "100% end in end-of-text" in report and f"prompts cut: {cut}" in report and "max 30" in report
    assert report.endswith(f"does not fit: {len(pairs) - len(fitting)}, first {first.where}")


def test_no_room_at_all():
    with pytest.raises(UserError, match="x:1 and every other row: no room in 5 tokens .*--max-length"):
        encode([Pair("p", "too long", "x:1")], byte_tokenizer(), EOS, 5)
    with pytest.raises(UserError, match="--max-length 2"):
        encode([Pair("p", "c", "x:1")], byte_tokenizer(), EOS, 2)
    assert encode([], byte_tokenizer(), EOS, 5) == ([], 0)
    assert length_report("val", [], [], 0, EOS) == "val: no rows"


def test_the_report_counts_rows_that_do_not_end(tmp_path):
    examples = [example(2, 3), Example([1, 2, 3], 1, Pair("p", "c", "x:2"))]
    assert "50% end in end-of-text" in length_report("train", [e.pair for e in examples], examples, 0, EOS)


def test_the_name_of_a_special_token_is_text():
    tokenizer = byte_tokenizer()
    assert EOS in tokenizer.encode("a<|endoftext|>b").ids  # what tokenizers does by itself
    examples, _ = encode([Pair("a<|endoftext|>b", "c<|endoftext|>", "x:1")], tokenizer, EOS, 100)
    ids = examples[0].ids[:-1]
    assert EOS not in ids and tokenizer.decode(ids) == "a<|endoftext|>b c<|endoftext|>"
    assert EOS in tokenizer.encode("<|endoftext|>").ids  # the caller's tokenizer is left as it was


def test_settings_of_the_tokenizer_do_not_reach_the_rows():
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=0)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOS)])
    assert [len(ids) for ids in tokenize(tokenizer, ["abcdefgh", "ab"])] == [8, 2]
    assert tokenizer.truncation["max_length"] == 4 and tokenizer.padding is not None


# Batches


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
    with pytest.raises(UserError, match="--batch-size 0"):
        batches(rows, 0, seed=0, epoch=0)


def test_collate_targets_completion_and_end_of_text_alone():
    pair = Pair("p", "c", "x:1")
    batch = [Example([1, 2, 3, 4, EOS], 3, pair), Example([5, 6, EOS], 1, pair)]
    ids, targets, lengths = collate(batch, pad_id=0)
    assert lengths == [4, 2]
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert targets.tolist() == [[-100, -100, 4, EOS], [6, EOS, -100, -100]]
    assert ids.dtype == targets.dtype == torch.int64


def test_collate_on_ragged_rows_against_a_plain_loop():
    batch = ragged(50, seed=3)
    ids, targets, lengths = collate(batch, pad_id=999)
    assert ids.shape == targets.shape == (50, max(lengths))
    assert lengths == [len(row.ids) - 1 for row in batch]
    for b, row in enumerate(batch):
        for t in range(ids.shape[1]):
            following = t + 1
            assert ids[b, t] == (row.ids[t] if following < len(row.ids) else 999)
            learned = row.n_prompt <= following < len(row.ids)
            assert targets[b, t] == (row.ids[following] if learned else -100)
