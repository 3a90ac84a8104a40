"""Files -> records, against files that json and csv wrote."""

import csv
import gzip
import json
import random
import tracemalloc

import pytest
from data_files import jsonl, numbered, read_file, texts, write

from minift.data.dataset import DataOptions, read_pairs
from minift.data.lines import MAX_LINE_BYTES
from minift.data.readers import FileFormat
from minift.errors import UserError

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
        ("name : A | area : B\n\nText:", "There is A . "),
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
    "null": (b'{"prompt": "p", "completion": null}\n', "field 'completion' is null"),
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
    "empty.json": (b"", "no usable row, the file holds none"),
    "none.json": (b"[]", "no usable row"),
    "unusable.jsonl": (b'{"prompt": "", "completion": "c"}\n', "no usable row, .*prompt: 1, first unus"),
    "bare16.jsonl": (GOOD.decode().encode("utf-16-le"), "bare16.jsonl:1: byte 2 is NUL.*utf-16-le"),
    "half16.jsonl": (GOOD.decode().encode("utf-16")[:-1], "cannot be decoded"),
    "binary.json": (bytes(range(256)), "binary.json:1: byte 1 is NUL"),
    "latin.json": (b'[{"prompt": "a",\n"completion": "\xe9"}]', r"latin.json:2: byte 16 \(0xe9\) is not"),
    "text.json": (b'"hello"', "text, and must be a list of objects"),
    "deep.json": (DEEP, "nested too deeply"),
    "cut.json": (b'[{"prompt": "p",\n "completion": "c"},\n', r"not valid JSON: .*\(line 3 column 1\)"),
    "row.json": (b"[" + GOOD + b", 7]", "row.json: row 2: the row is a number"),
    "bars.txt": (b"a||b\nno bars\n", "bars.txt:2: no || between prompt and completion".replace("|", r"\|")),
    "twice.csv": (b"prompt,completion,prompt\na,b,c\n",
                  r"which of its fields 'prompt \(column 1\)', 'completion', 'prompt \(column 3\)'"),
    "short.csv": (CSV_HEAD + b'"a\nb",c\nd\n', "short.csv:4: 1 fields, and the header has 2"),
    "long.csv": (CSV_HEAD + b"a,b,c\n", "long.csv:2: 3 fields, and the header has 2"),
    "quote.csv": (CSV_HEAD + b'a,b\n"open,c\nd,e\n', "quote.csv:3: .*not valid CSV.*line 4; .*quote"),
    "after.csv": (CSV_HEAD + b'"a"x,b\nc,d\n', "after.csv:2: not valid CSV"),
    "nul.csv": (CSV_HEAD + b"a,b\nc\0,d\n", "nul.csv:3: byte 2 is NUL"),
    "latin.tsv": (b"prompt\tcompletion\ncaf\xe9\tx\n", r"latin.tsv:2: byte 4 \(0xe9\) is not UTF-8"),
    "rows.parquet": (b"PAR1", "this is Parquet, convert it .*pandas.read_parquet.'rows.parquet'"),
    "rows.json": (b"PAR1", "this is Parquet"),
    "book.xlsx": (b"PK\x03\x04", "an Excel workbook, .*pandas.read_excel"),
    "rows.db": (b"SQLite format 3\0", "an SQLite database, .*sqlite3 -csv -header rows.db"),
    "rows.jsonl.zst": (b"\x28\xb5\x2f\xfd", "packed with zstd, .*zstd -d rows.jsonl.zst"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer .*git lfs pull"),
    "page.csv": (b"<!DOCTYPE html><html>", "a web page"),
    "noname": (b"prose", "unknown kind of file '', .*known are .jsonl"),
    "cut.jsonl.gz": (gzip.compress(GOOD * 99)[:40], "gzip file is damaged"),
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
            assert all(completion.encode() for _, completion in texts(pairs))
            assert all(prompt.encode() for prompt, _ in texts(pairs)) or name == "a.txt"  # a text alone


def test_missing_files_and_folders(tmp_path):
    for data, message in [("", "no data"), (None, "no data"), (str(tmp_path / "x.jsonl"), "no such file"),
                          ("/dev/null", "not a file"), ("x" * 5000, "no such file"),
                          ("a\0b", "no such file")]:
        with pytest.raises(UserError, match=message):
            read_pairs(DataOptions(data=data), seed=0)


# Files as people have them: the content decides

ROWS = [{"prompt": f"p{i}", "completion": f"c {i}"} for i in range(4)]
PAIRS = [(row["prompt"], row["completion"]) for row in ROWS]
CONTAINERS = {
    "list": json.dumps(ROWS),
    "list over lines": json.dumps(ROWS, indent=2),
    "list, an object a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "object a line": jsonl(ROWS),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "data": json.dumps({"data": ROWS}),
    "data over lines": json.dumps({"version": "1.1", "data": ROWS}, indent=2),
    "data, an object a line": '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}",
    "columns": json.dumps({"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}),
    "pandas columns": json.dumps({"prompt": {str(i): p for i, (p, _) in enumerate(PAIRS)},
                                  "completion": {str(i): c for i, (_, c) in enumerate(PAIRS)}}),
    "pandas index": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "viewer": json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}),
}  # fmt: skip


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt", "rows.csv", "rows", "rows.json.gz"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_json_in_any_container_under_any_name(tmp_path, container, name):
    content = CONTAINERS[container].encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(read_file(path)[0]) == PAIRS


def test_a_long_document_on_one_line(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c" * 300} for i in range(1000)]
    for content in (json.dumps(rows), json.dumps({"data": rows}), jsonl(rows)):
        assert len(read_file(write(tmp_path / "rows.json", content))[0]) == 1000
        assert len(read_file(write(tmp_path / "rows.jsonl", content))[0]) == 1000


def test_one_row_alone_is_a_row(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for row in (ROWS[0], {"messages": turns}):
        for indent in (None, 2):
            path = write(tmp_path / "row.jsonl", json.dumps(row, indent=indent))
            assert len(read_file(path)[0]) == 1


def test_a_gzip_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("minift.data.lines.MAX_UNPACKED_BYTES", 2**20)
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(jsonl(numbered(20_000)).encode()))
    with pytest.raises(UserError, match="rows.jsonl.gz: more than .* unpacked: unpack it with gunzip first"):
        read_file(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "cp1252", "latin-1", "utf-16-le", "shift_jis"])
def test_encodings(tmp_path, encoding):
    row = {"prompt": "日本" if encoding == "shift_jis" else "café\n", "completion": "x"}
    for suffix, content in ((".jsonl", json.dumps(row, ensure_ascii=False) + "\n"),
                            (".csv", f'prompt,completion\n"{row["prompt"]}",x\n')):
        path = write(tmp_path / f"rows{suffix}", content.encode(encoding))
        said = "utf-8" if encoding in ("utf-16", "utf-32") else encoding  # a mark says it
        pairs, _ = read_file(path, format=FileFormat(said))
        assert texts(pairs) == [(row["prompt"], "x")]


def test_a_wrong_encoding_is_said(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt,completion\ncafé,x\n".encode("cp1252"))
    with pytest.raises(UserError, match=r"rows.csv:2: byte 4 \(0xe9\) is not UTF-8: .*--encoding cp1252"):
        read_file(path)
    with pytest.raises(UserError, match=r"rows.csv:2: byte 4 \(0xe9\) is not ASCII"):
        read_file(path, format=FileFormat("ascii"))
    for name in ("klingon", "rot13", "hex", ""):
        with pytest.raises(UserError, match=f"--encoding '{name}': not a known encoding"):
            read_file(path, format=FileFormat(name))


# Separated values in any dialect

SAID = [("Now, what; does | Ann eat?", 'soup, "hot"'), ("two\nlines", "x"), (" lead", "trail ")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "^"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".psv"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_the_delimiter_is_found_out(tmp_path, delimiter, suffix, quoting):
    path = tmp_path / f"rows{suffix}"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("prompt", "completion"), *SAID])
    given = delimiter if delimiter == "^" else None
    pairs, notes = read_file(path, format=FileFormat(delimiter=given))
    assert texts(pairs) == SAID
    usual = {".csv": ",", ".tsv": "\t", ".psv": "|"}[suffix]
    assert ("separated by" in notes[0]) == (delimiter != usual)


def test_a_separator_in_other_names_does_not_mislead(tmp_path):
    path = write(tmp_path / "rows.csv", "prompt;completion, short\nWhat, or who?;a, b, c\nx;y\n")
    pairs, _ = read_file(path, "prompt", "completion, short")
    assert texts(pairs) == [("What, or who?", "a, b, c"), ("x", "y")]


@pytest.mark.parametrize("said", ["tab", "\\t", "\t"])
def test_the_delimiter_can_be_given(tmp_path, said):
    path = write(tmp_path / "rows.txt", "prompt\tcompletion\na\tb\n")
    assert texts(read_file(path, format=FileFormat(delimiter=said))[0]) == [("a", "b")]
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(UserError, match="--delimiter .*must be one character"):
            read_file(path, format=FileFormat(delimiter=wrong))


def test_a_sep_line_names_the_separator(tmp_path):
    path = write(tmp_path / "rows.csv", "sep=^\r\nprompt^completion\r\na,b;c^d\r\n")
    pairs, _ = read_file(path)
    assert pairs[0].where == "rows.csv:3" and texts(pairs) == [("a,b;c", "d")]


def test_quotes_are_characters_in_an_export_of_plain_text(tmp_path):
    """Each file has quotes that do not pair up, a pair over lines, or quotes inside a field."""
    for middle in (['"open, he said', "x"], ['"open', 'shut"', "x"], ['He said "no" twice', '"no" she said']):
        rows = [("one", "a"), *((text, "b") for text in middle), ("last", "c")]
        content = "prompt\tcompletion\n" + "".join(f"{p}\t{c}\n" for p, c in rows)
        pairs, notes = read_file(write(tmp_path / "rows.tsv", content))
        assert texts(pairs) == rows and "quotes are characters" in notes[0]
    quoted = 'prompt\tcompletion\n"say ""no""\nor\tyes"\tx\n'
    assert texts(read_file(write(tmp_path / "rows.tsv", quoted))[0]) == [('say "no"\nor\tyes', "x")]


def test_a_space_before_a_quote(tmp_path):
    path = write(tmp_path / "rows.csv", 'prompt, completion\n"a, b", "c, d"\n"e", "f ""g"""\n')
    pairs, notes = read_file(path)
    assert texts(pairs) == [("a, b", "c, d"), ("e", 'f "g"')] and "spaces after a separator" in notes[0]
    path = write(tmp_path / "rows.csv", "prompt,completion\na, b\n")  # without quotes it is the file's text
    assert texts(read_file(path)[0]) == [("a", " b")]


def test_a_table_without_a_header(tmp_path):
    path = write(tmp_path / "rows.csv", "a;b\nc;d, e\n")
    pairs, _ = read_file(path, format=FileFormat(columns="prompt, completion"))
    assert texts(pairs) == [("a", "b"), ("c", "d, e")] and pairs[0].where == "rows.csv:1"
    with pytest.raises(UserError, match="which of its fields 'a', 'b' .*--columns"):
        read_file(path)
    with pytest.raises(UserError, match="rows.csv:1: 2 fields, and --columns names 3"):
        read_file(path, format=FileFormat(columns="prompt,completion,x"))
    with pytest.raises(UserError, match="--columns 'prompt,': must be names"):
        read_file(path, format=FileFormat(columns="prompt,"))


def test_columns_that_nobody_uses(tmp_path):
    content = ",prompt,completion,x,x,,,\n0,a,b,1,2,,,\n1,c,d,,,,,,,\n"
    path = write(tmp_path / "rows.csv", content)
    assert texts(read_file(path)[0]) == [("a", "b"), ("c", "d")]
    assert texts(read_file(path, "x (column 5)", "column 1", skip_bad=True)[0]) == [("2", "0")]
    with pytest.raises(UserError, match="no field 'x', there are .*'x .column 4.', 'x .column 5.'"):
        read_file(path, "x")


def test_a_table_in_a_text_file(tmp_path):
    path = write(tmp_path / "rows.txt", "label\tmessage\nham\tsee you\nspam\twin, now\n")
    assert texts(read_file(path, "message", "label")[0]) == [("see you", "ham"), ("win, now", "spam")]


# Text alone


def test_a_text_is_one_document_as_it_is(tmp_path):
    text = "  One.\n\n\tTwo || three.\r\nFour\n"
    assert texts(read_file(write(tmp_path / "a.txt", text))[0]) == [("", text)]


def test_documents_are_parted_by_end_of_text(tmp_path):
    text = "One.\nTwo.\n<|endoftext|>\n  Three.\n<|endoftext|>Four.<|endoftext|>\n"
    pairs, notes = read_file(write(tmp_path / "a.txt", text))
    assert texts(pairs) == [("", "One.\nTwo."), ("", "  Three."), ("", "Four.")]
    assert [pair.where for pair in pairs] == ["a.txt:1", "a.txt:4", "a.txt:5"]
    assert "text alone, without prompts: every token is learned" in notes[0]
