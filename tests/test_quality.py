"""Findings on the quality of rows: each on a hand-made file that has it, and not on one without it."""

import random
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl, write
from scripts import QUICK, ROOT, json_of, trained

from minift.data.dataset import DataOptions, check_quality, read_pairs
from minift.data.layouts import Pair
from minift.data.quality import SAMPLE, Finding, Quality, facts, report
from minift.data.texts import CLOSED, OPEN, UNKNOWN, bare, ending, language

NAMES = ("Anna", "Ben", "Carol", "David", "Emma", "Frank", "Grace", "Henry")
THINGS = ("the old bike", "a cup of tea", "the red car", "a big map", "the small boat", "a long letter", "the hat")
PLACES = ("at the station", "in the garden", "near the river", "behind the school", "under the bridge")


def clean(count: int = 60) -> list[tuple[str, str]]:
    """Rows without a finding: all different, of similar length, in English, with a full stop."""
    rows = []
    for i in range(count):
        name, thing = NAMES[i % 8], THINGS[i // 8 % 7]
        place = PLACES[i // 56 % 5]
        question = f"Question {i}: who has {thing} {place} today?"
        rows.append((question, f"{name} was there, and {thing} was {place} too."))
    return rows


def find(rows: list[tuple[str, str]]) -> dict[str, Finding]:
    quality = Quality()
    for number, (prompt, completion) in enumerate(rows, 1):
        quality.add(Pair(prompt, completion, f"x:{number}"))
    return {finding.name: finding for finding in quality.findings()}


def check_file(path: Path, **options: Any) -> list[Finding]:
    pairs = read_pairs(DataOptions(data=str(path), **options), 0)
    seen = Quality()
    for pair in pairs.train:
        seen.add(pair)
    return check_quality(pairs, seen)


def only(rows: list[tuple[str, str]], name: str) -> Finding:
    """The finding of rows that have no other."""
    found = find(rows)
    assert list(found) == [name], found
    return found[name]


def test_clean_rows_have_no_finding() -> None:
    assert find(clean()) == {} and find([]) == {} and find(clean(1)) == {}
    assert find([("", " ".join(completion for _, completion in clean()))]) == {}  # one text alone


# ---- near-duplicates and prompts


@pytest.mark.parametrize("one, other", [
    (("Who came?", "Anna came at noon."), ("who came", "Anna came, at noon")),
    (("Wo ist die STRASSE?", "Dort."), ("wo ist die Straße", "dort")),
    (("谁来了？", "安娜来了。"), ("谁来了", "安娜来了")),
    (("من جاء؟", "جاءت آنا."), ("من جاء", "جاءت آنا")),
    (("Кто пришёл?", "«Анна»."), ("кто пришёл", "анна")),
    (("caf\u00e9?", "Yes."), ("cafe\u0301", "yes")),
])  # fmt: skip
def test_near_duplicates(one: tuple[str, str], other: tuple[str, str]) -> None:
    found = find([*clean(), one, other, one])["near_duplicates"]  # the third equals the first exactly: no new finding
    assert (found.count, found.first) == (1, "x:62, like x:61")


@pytest.mark.parametrize("one, other", [
    (("Sort: 3 12 1", "1 3 12"), ("Sort: 31 2 1", "1 3 12")),  # other numbers
    (("2 + 2", "4"), ("2 < 2", "4")),  # symbols are no punctuation
    (("कि", "हाँ"), ("की", "हाँ")),  # vowels of Hindi
    (("...", "dots"), ("???", "dots")),  # nothing but punctuation
    (("ab", "c"), ("a", "bc")),
])  # fmt: skip
def test_rows_that_are_no_near_duplicates(one: tuple[str, str], other: tuple[str, str]) -> None:
    assert "near_duplicates" not in find([*clean(), one, other])


def test_prompts_with_several_completions() -> None:
    rows = clean()
    prompt, completion = rows[4]
    other = (prompt, "It was Ben who was there, with all of it.")
    found = only([*rows, other, rows[7], (prompt, completion)], "several_completions")
    assert (found.count, found.first) == (1, "x:61 and x:5") and "1 of 60 prompts" in found.text
    repeats = [rows[7], (prompt, completion.upper())]
    assert find([*rows, *repeats]).keys() == {"near_duplicates"}  # exact repeats are counted where files are read
    assert find([("", completion) for _, completion in rows]) == {}  # texts alone have no prompt to share


def test_prompts_of_test_that_are_nearly_in_train() -> None:
    quality = Quality()
    quality.add(Pair("Who came?", "Anna.", "train:1"))
    quality.add(Pair("Sort: 3 12", "3 12", "train:2"))
    prompts = ["Who came?", "Sort: 31 2", "who CAME", "who CAME", "Who went?"]
    pairs = [Pair(prompt, "a", f"test:{number}") for number, prompt in enumerate(prompts, 1)]
    found = quality.near_prompts("test", pairs)
    assert (found.name, found.count, found.first, found.split) == ("near_prompts_test", 1, "test:3", "test")
    assert report([found]) == ["test: prompts that equal one of train but for case, space and punctuation: 1 of 4, "
                               "first test:3"]
    assert quality.near_prompts("test", pairs[:2]) is None and quality.near_prompts("test", []) is None


# ---- completions


def test_copied_completions() -> None:
    rows = clean()
    rows[30] = ("Text: He told us that ANNA found the bike, at last, in the garden.\n\nSummary:",
                "Anna found the bike at last in the garden.")
    rows[40] = ("Was it Anna Brown and Ben?", "Anna Brown and Ben.")  # a name
    assert (found := only(rows, "copied_completions")).count == 1 and found.first == "x:31"
    rows[30] = (rows[30][0], "Anna found the bike at last in the old garden.")
    assert find(rows) == {}


CUT = {
    "English": ("Anna found the old bike in the garden of the school.",
                "Anna found the old bike in the garden and then she was"),
    "Chinese": ("安娜在学校的花园里找到了她的旧自行车，非常高兴。", "安娜在学校的花园里找到了她的旧自行车，非常高兴"),
    "Hindi": ("अन्ना को स्कूल के बगीचे में अपनी साइकिल मिली थी।", "अन्ना को स्कूल के बगीचे में अपनी साइकिल मिली थी"),
    "Arabic": ("هل وجدت آنا دراجتها في حديقة المدرسة القديمة؟", "هل وجدت آنا دراجتها في حديقة المدرسة القديمة"),
    "Armenian": ("Աննան գտավ իր հին հեծանիվը դպրոցի այգում։", "Աննան գտավ իր հին հեծանիվը դպրոցի այգում"),
    "quoted": ("Ben said: “Anna found the old bike in the garden.”</s>",
               "Ben said that Anna had found the old bike,</s>"),
}


@pytest.mark.parametrize("kind", CUT)
def test_cut_completions(kind: str) -> None:
    whole, cut = CUT[kind]
    rows = [(f"question {i}", whole) for i in range(40)]
    assert find(rows) == {}, "and labels that are repeated are no common beginning"
    rows[12] = ("question 12", cut)
    found = only(rows, "cut_completions")
    assert (found.count, found.first) == (1, "x:13") and "97.5%" in found.text


def test_completions_without_full_stops_are_not_cut_where_that_is_usual() -> None:
    whole, cut = CUT["English"]
    assert find([(f"question {i}", cut if i % 2 else whole) for i in range(40)]) == {}
    thai = "แอนนาพบจักรยานเก่าของเธอในสวนของโรงเรียนเมื่อวานนี้"  # Thai has no full stop
    assert "cut_completions" not in find([(f"question {i}", thai if i % 2 else whole) for i in range(80)])


@pytest.mark.parametrize("text, kind", [
    ("Yes.", CLOSED), ("Really?!", CLOSED), ("(It is so.)", CLOSED), ("Wait …  \n", CLOSED), ("はい。」", CLOSED),
    ("Paris", UNKNOWN), ("", UNKNOWN), ("...", CLOSED), ("See you all there tomorrow in the garden then :)", UNKNOWN),
    ("These are the first three that were named:\n1. the one with the longest of all the names", UNKNOWN),
    ("def function(first_value, second_value):\n    return {first_value + second_value}", UNKNOWN),
    ("Then they all went to the old house by the river, and", OPEN),
    ("Then they all went to the old house, river,", OPEN),
])  # fmt: skip
def test_endings(text: str, kind: int) -> None:
    assert ending(text) == kind


def test_length_outliers() -> None:
    rows = clean()
    assert "length_outliers" not in find([*rows[:-1], ("a", rows[0][1] * 2)])
    rows[20], rows[50] = ("question 20", "yyy"), ("question 50", "Anna was there. " * 100)
    found = only(rows, "length_outliers")
    assert (found.count, found.first) == (2, "x:21") and "1 over" in found.text and "1 under" in found.text
    del rows[50]
    assert "over" not in only(rows, "length_outliers").text


def test_rows_of_another_kind_are_no_length_outliers() -> None:
    rows = clean()
    rows[::6] = [(prompt, "No.") for prompt, _ in rows[::6]]  # a sixth of the completions are short answers
    assert find(rows) == {}
    lengths = [random.Random(i).lognormvariate(4, 1) for i in range(1000)]  # 2 or 3 are 3 sigma away
    assert find([(f"question {i}", "a" * int(length) + ".") for i, length in enumerate(lengths)]) == {}


@pytest.mark.parametrize("text, name", [
    ("Анна была там, и старый велосипед был в саду.", "Cyrillic"),
    ("アンナは昨日、学校の庭で古い自転車を見つけました。", "Chinese or Japanese"),
    ("η Άννα ήταν εκεί και το παλιό ποδήλατο στον κήπο.", "Greek"),
    ("Anna ist nicht da, und das Rad ist auch nicht im Garten.", "German"),
    ("Anna n'est pas ici, et les livres sont avec elle dans une boîte.", "French"),
    ("Anna no está aquí, y los libros son para el niño del río.", "Spanish"),
])
def test_rare_languages(text: str, name: str) -> None:
    rows = clean()
    rows[33] = ("question 33", text)
    found = only(rows, "rare_languages")
    assert (found.count, found.first) == (1, "x:34") and f"{name} 1 " in found.text and "English 59" in found.text
    rows[34:54] = [(f"question {i}", text) for i in range(34, 54)]
    assert "rare_languages" not in find(rows)


def test_languages_are_not_told_from_few_words() -> None:
    assert [language(text) for text in ("", "12 + 3", "Te amo", "🙂", "5 µm", "I do want to go")] == [
        "Latin", "Latin", "Latin", "", "Latin", "Latin"]
    labels = [(f"question {i}", ("positive", "negative")[i % 2]) for i in range(60)]
    assert find([*labels, ("question 60", "It was the best of all that they have.")]).keys() <= {"length_outliers"}


def test_common_beginning() -> None:
    rows = clean()
    begun = [(prompt, f"Sure, here is the answer: {completion}" if i % 3 else completion)
             for i, (prompt, completion) in enumerate(rows)]
    found = only(begun, "common_beginning")
    assert (found.count, found.first) == (40, "x:2") and "'Sure, here is the answer:': 67%" in found.text
    half = [(prompt, f"Summary: {completion}" if i % 2 else completion) for i, (prompt, completion) in enumerate(rows)]
    assert find(half) == {}  # not more than half
    assert find([(prompt, f"Summaries{i} are all here.") for i, (prompt, _) in enumerate(rows)]) == {}  # part of a word
    assert find([(prompt, "not spam" if i % 3 else "spam") for i, (prompt, _) in enumerate(rows)]) == {}  # labels
    chinese = [(prompt, f"好的，以下是答案：{i * 7919}。") for i, (prompt, _) in enumerate(rows)]
    assert "'好的，以下是答案：'" in only(chinese, "common_beginning").text


# ---- size, report, run


def test_no_text_is_kept() -> None:
    quality = Quality()
    for i in range(2 * SAMPLE):
        quality.add(Pair(f"prompt {i} " + "x" * 100, f"completion {i}. " + "y" * 2000 + ".", f"train.jsonl:{i}"))
    columns = (quality.rows, quality.prompts, quality.bare_prompts, quality.bare_completions, quality.lengths,
               quality.endings, quality.languages, quality.copied, quality.place_ends)
    assert {len(column) for column in columns} == {2 * SAMPLE}
    assert sum(column.itemsize for column in columns) == 47  # bytes a row, beside the text of its place
    assert len(quality.beginnings) == SAMPLE and max(len(text) for text, _ in quality.beginnings) == 200
    assert len({index for _, index in quality.beginnings}) == SAMPLE
    late = sum(index >= SAMPLE for _, index in quality.beginnings)
    assert abs(late - SAMPLE / 2) < 250  # each row has the same chance: 5 standard deviations
    assert set(vars(quality)) == {
        "rows", "prompts", "bare_prompts", "bare_completions", "lengths", "endings", "languages", "copied", "places",
        "place_ends", "language_numbers", "beginnings", "random"}
    assert quality.place(7) == "train.jsonl:7" and len(quality.language_numbers) == 1


def test_bare_texts() -> None:
    assert bare("It's 7:30, p.m.!") == (b"its730pm", b"7 30") and bare("?!") == (b"?!", b"")
    assert bare("ÉCOLE «A»\u00a0b")[0].decode() == "écoleab" and bare("") == (b"", b"")


def test_the_embedded_pairs_have_no_finding() -> None:
    assert check_file(ROOT / "data" / "tiny" / "pairs") == []


def test_a_run_prints_the_findings_and_keeps_them(model_folder: Path, tmp_path: Path, quick: Any) -> None:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in clean(30)]
    rows[9]["completion"] = "Анна была там, и велосипед был там тоже."
    rows.append({"prompt": rows[3]["prompt"].upper(), "completion": rows[3]["completion"]})
    (tmp_path / "data").mkdir()
    before = write(tmp_path / "data" / "train.jsonl", jsonl(rows)).read_bytes()
    test_row = {"prompt": rows[5]["prompt"] + "!", "completion": "Ben was there."}
    write(tmp_path / "data" / "test.jsonl", jsonl([test_row]))
    options = ["--model", model_folder, "--data", tmp_path / "data", *QUICK, "--steps", 2, "--split", "100,0,0"]
    out = trained(*options, "--mode", "lora", "--out", tmp_path / "run")
    for line in ("  train: rows that equal an earlier one but for case, space and punctuation: 1, first "
                 "train.jsonl:31, like train.jsonl:4\n",
                 "  train: completions in a rare language or script: Cyrillic 1 (most frequent: English 30), first "
                 "train.jsonl:10\n",
                 "  test: prompts that equal one of train but for case, space and punctuation: 1 of 1, first "
                 "test.jsonl:1\n"):
        assert line in out
    expected = {"near_duplicates": {"count": 1, "first": "train.jsonl:31, like train.jsonl:4"},
                "rare_languages": {"count": 1, "first": "train.jsonl:10"},
                "near_prompts_test": {"count": 1, "first": "test.jsonl:1"}}
    assert json_of(tmp_path / "run" / "result.json")["data_quality"] == expected
    assert facts(check_file(tmp_path / "data", split="100,0,0")) == expected
    assert (tmp_path / "data" / "train.jsonl").read_bytes() == before
