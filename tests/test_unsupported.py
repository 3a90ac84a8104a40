"""Names and numbers that a completion invents: rows by hand in several languages, and the embedded world."""

import json
import random
import re

import pytest
from scripts import ROOT

from minift.report.unsupported import check, ordinary_words

ORDINARY = set("the she he they we then not it see you ok us он она".split())
# prompt, completion, the names and numbers of the completion, those of them that are unsupported
ROWS = [
    # names
    ("Anna: Hi, Ben", "Ben will meet Anna and Carl", "Ben Anna Carl", "Carl"),
    ("hi anna", "She will meet Anna.", "Anna", ""),
    ("ANNA IS HERE", "He saw Anna", "Anna", ""),
    ("Anna is here", "He saw ANNA and NATO", "ANNA NATO", "NATO"),
    ("Anna is here", "He saw Anna's dog and Ben's cat", "Anna's Ben's", "Ben's"),
    ("Anna\u2019s dog", "It is Anna's", "Anna's", ""),
    ("the Smiths", "He met Smith. They are Smith\u2019s", "Smith Smith's", ""),
    ("a German", "He met Germans", "Germans", ""),
    ("Jean Luc", "He met Jean-Luc and Jean-Paul", "Jean-Luc Jean-Paul", "Jean-Paul"),
    ("O'Brien", "He met O\u2019Brien and O'Neill", "O'Brien O'Neill", "O'Neill"),
    ("no names", "He says I'm late and I know", "", ""),
    ("see you", "They meet on Monday in June", "Monday June", "Monday June"),
    ("Mr Brown called", "It was Mr. Brown and Mrs. Green", "Brown Green", "Green"),
    ("J. K. Rowling", "He read J. K. Rowling and J. R. Tolkien", "Rowling Tolkien", "Tolkien"),
    ("the US army", "He was in the U.S. Army", "Army", ""),
    ("no", "He went to Saint-Denis", "Saint-Denis", "Saint-Denis"),
    ("no", "Then we left. Not now! They stay: She goes", "", ""),
    ("no", "Zoe will come. Then Max goes", "Zoe Max", "Zoe Max"),  # not ordinary words, so names at a start, too
    ("no", "the NOT very OK thing", "", ""),  # emphasis is no name
    ("no", "He said: \"We see.\" (Tom)", "Tom", "Tom"),
    ("no", "- He\n- Ida\n\u2022 They", "Ida", "Ida"),
    ("no", "He has an iPhone", "", ""),  # begins in lower case
    ("Anna: Hi", "Anna: Hi\nBob: Hi", "Anna Hi Bob Hi", "Bob"),
    ("no", "Q: Vitamin C? A: He met Mr. Not. They", "Vitamin Not", "Vitamin Not"),  # a letter is no name
    ("no", "at 5 p.m. They left, 10KM away", "5 10", "5 10"),
    # numbers
    ("at 7pm", "at 7:00, 7 pm, 7PM and 19:00, not 8", "7:00 7 7 19:00 8", "8"),
    ("at 19:30", "at 7:30 pm or 7.30 p.m. or 7.30", "7:30 7.30 7.30", "7.30"),
    ("1,000.50 euros", "1000.5, 1.000,50, 1 000.50 and 1'000.50 but 1000", "1000.5 1.000,50 1 000.50 1'000.50 1000",
     "1000"),
    ("1000 euros", "1,000 and 1.000 and 1\u202f000 and 01000", "1,000 1.000 1 000 01000", ""),
    ("1,234,567 people", "1234567 or 1.234.567 or 1 234 568", "1234567 1.234.567 1 234 568", "1 234 568"),
    ("the 3rd", "3 or 3% or 3rd or 3D or $3 or \u20ac4", "3 3 3 3 3 4", "4"),
    ("12/10/2020", "12.10.2020 or 12-10-2021", "12 10 2020 12 10 2021", "2021"),
    ("rooms 5, 6", "rooms 5,6,7", "5 6 7", "7"),
    ("3.14", "3,14 or 3.140 or 3.15", "3,14 3.140 3.15", "3.15"),
    ("COVID-19", "COVID-19 and COVID-20", "COVID 19 COVID 20", "20"),
    ("MP3", "MP3 and MP4", "MP 3 MP 4", "4"),
    ("two", "2", "2", "2"),  # a limit that is said
    ("room ١٢", "room 12 or ١٣", "12 13", "13"),  # Arabic-Indic digits
    ("room １２", "room 12 or １３", "12 13", "13"),  # full width
    ("1234567 or 123.45", "1234.567 or 1,23.45", "1234.567 1 23 45", "1234.567 1 23 45"),
    ("no", "room 1 2345 at 10:30.5", "1 2345 10 30 5", "1 2345 10 30 5"),
    ("10:30:15", "10:30:15 or 10:30", "10:30:15 10:30", "10:30"),
    # other languages
    ("José llega", "he saw Jose\u0301, Jose and Ramón", "José Jose Ramón", "Ramón"),
    ("MÜLLER", "il voit Müller et Straßer", "Müller Straßer", "Straßer"),
    ("Anna", "le chien d'Anna et celui d\u2019Hugo", "d'Anna d'Hugo", "d'Hugo"),
    ("Ankara", "he lives in Ankara'da or İzmir'de", "Ankara'da İzmir'de", "İzmir'de"),
    ("İzmir", "he lives in İzmir and izmir", "İzmir", ""),
    ("Анна и Максим", "Он видел Анну, Максима и Марка", "Анну Максима Марка", "Марка"),
    ("Мария из Москвы", "она была в Москве с Марией и Игорем", "Москве Марией Игорем", "Игорем"),
    ("Δοστοέβσκι", "του Δοστοέβσκι και του Γιώργου", "Δοστοέβσκι Γιώργου", "Γιώργου"),
    ("Иванов и Толстой", "он знал Ивановых и Толстого", "Ивановых Толстого", ""),
    ("ışık", "he met Işık", "Işık", ""),
    ("M\u0304ari", "he met M\u0304ari and M\u0304aro", "M\u0304ari M\u0304aro", "M\u0304aro"),
    ("ΓΙΩΡΓΟΣ", "του Γιώργου", "Γιώργου", ""),
    ("张三在下午7点", "李四在8点", "8", "8"),  # scripts without capitals: numbers only
    ("أنا ٥", "هو ٥ و ٦", "5 6", "6"),
    ("An\u00adna", "he saw Anna", "Anna", ""),  # a soft hyphen
    ("", "", "", ""),
]


@pytest.mark.parametrize("prompt, completion, names, unsupported", ROWS)
def test_rows_by_hand(prompt: str, completion: str, names: str, unsupported: str) -> None:
    total, missing = check(completion, (prompt, "a reference"), ORDINARY)
    assert " ".join(missing) == unsupported
    _, every = check(completion, ("", ""), ORDINARY)  # without sources all of them are unsupported
    assert " ".join(every) == names and total == len(every)


def test_words_that_the_rows_write_in_lower_case_are_no_names_at_a_start() -> None:
    texts = ["We will go. Will you? They will.", "Ask Mark. I said Mark, mark my words", "THEY ask Rose: rose, rose"]
    ordinary = ordinary_words(texts)
    assert {"will", "go", "rose"} <= ordinary and not {"mark", "they", "we"} & ordinary
    assert check("Will and Mark saw Rose. Rose and They.", [""], ordinary) == (3, ["Mark", "Rose", "They"])


def test_a_completion_without_end_is_read() -> None:
    """A model may repeat itself: Python refuses to convert more than 4,300 digits."""
    for text in ("1" * 5000 + ":00 pm", "9" * 5000 + "." + "0" * 5000, "Ab" * 5000, "'-." * 5000, "а" * 3000 + "б"):
        assert check(text, [text], set()) == (len(check(text, [""], set())[1]), [])


HOURS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def with_digits(text: str) -> str:
    """The embedded rows write times in words: half past ten -> 10:30, at ten -> at 10."""
    for hour, word in enumerate(HOURS, 1):
        text = re.sub(rf"half past {word}\b", f"{hour}:30", text, flags=re.IGNORECASE)
        text = re.sub(rf"quarter to {word}\b", f"{(hour - 2) % 12 + 1}:45", text, flags=re.IGNORECASE)
        text = re.sub(rf"\b{word}\b", str(hour), text, flags=re.IGNORECASE)
    return text


def corrupt(text: str, source: str, names: list[str], chance: random.Random) -> tuple[str, list[str], int]:
    """The text with some names, days and times swapped for others that are not in `source`; those, and the number of
    all."""
    swapped, count = [], 0
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    times = [f"{hour}{minutes}" for hour in range(1, 12) for minutes in ("", ":30", ":45")]

    def swap(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        if chance.random() < 0.7:
            return match[0]
        pool = times if match[0][0].isdigit() else days if match[0] in days else names
        absent = [word for word in pool if not re.search(rf"(?<![\d:]){word}(?!\d|:\d)", source)]
        swapped.append(chance.choice(absent))
        return swapped[-1]

    return re.sub(r"\d+(?::\d+)?|[A-Z][a-z]+", swap, text), swapped, count


def test_swapped_names_and_numbers_of_the_embedded_rows_are_found() -> None:
    """The reference itself, with some words swapped, as the completion: it is known which ones are wrong. A reference
    alone supports them all, so only the prompt is the source."""
    lines = (ROOT / "data" / "tiny" / "pairs" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{name: with_digits(text) for name, text in json.loads(line).items()} for line in lines]
    ordinary = ordinary_words(text for row in rows for text in row.values())
    names = re.findall(r"^[A-Z]\w+(?=:)", "\n".join(row["dialogue"] for row in rows), re.MULTILINE)
    names = sorted({*names, "Anna", "Ben", "Zoe", "Yusuf"})  # four that no row has
    chance, wrong, found, right, total = random.Random(0), 0, 0, 0, 0
    for row in rows:
        text, swapped, count = corrupt(row["summary"], row["dialogue"], names, chance)
        mentions, missing = check(text, [row["dialogue"]], ordinary)
        assert mentions == count
        wrong, found, total = wrong + len(swapped), found + len(missing), total + count
        right += sum(1 for word in missing if word.removesuffix("'s") in swapped)
    assert wrong > 150 and total > 3 * wrong
    assert right == found == wrong, f"precision {right / found}, recall {right / wrong}"
