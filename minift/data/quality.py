"""Findings on the quality of training rows, for the data report: what may be wrong with them, never changed.

The rows are seen once, in their order; of each, hashes and small numbers are kept, some 70 bytes, and no text.
"""

import random
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minift.data.layouts import Pair
from minift.data.texts import CLOSED, FUNCTION_WORDS, LATIN, OPEN, bare, ending, language

COPIED_BYTES = 20  # letters and digits of a completion that its prompt contains: fewer are a name or a label
MOST_CLOSED = 0.7  # of a script's completions end in a full stop, where those without one are reported
FAR = 4.5  # standard deviations of log length between an outlier and the median
FACTOR = 4.0  # and an outlier is at least so many times longer or shorter than the median
MOST_OUTLIERS = 0.01  # where more rows are that far, they are rows of another kind
FEW_ROWS = 20  # with fewer rows nothing is called rare or far from the others
RARE = 1000  # a language is rare if the most frequent one has so many times its rows
SAMPLE = 10_000  # completions whose beginnings are compared
BEGINNING = 200  # characters of a completion that are compared, and that tell its language
BEGINNING_BYTES = 8  # of a common beginning at least: "Summary:", and not "The "
CONTINUATIONS = 10  # different completions that have it; a label that is repeated is no common beginning
WORD_END = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff]|[\s!-/:-@\[-`{-~、。，：！？]+")  # Chinese has no space

Facts = dict[str, dict[str, int | str]]  # {name of a finding: {"count", "first"}}, for result.json


@dataclass(frozen=True)
class Finding:
    name: str
    count: int  # rows
    first: str  # where the first of them is: "train.jsonl:12"
    text: str  # a sentence for the report, without the place
    split: str = "train"


class Quality:
    """`add` each row, then ask for `findings`."""

    def __init__(self) -> None:
        # a value for each row, in columns
        self.rows = array("q")  # hash of prompt and completion
        self.prompts = array("q")  # hash of the prompt
        self.bare_prompts = array("q")  # of its letters and digits alone
        self.bare_completions = array("q")
        self.lengths = array("I")  # characters of the completion
        self.endings = array("B")
        self.languages = array("B")  # number in `language_numbers`
        self.copied = array("B")  # whether the prompt contains the completion
        self.places = bytearray()  # "train.jsonl:1train.jsonl:2..."
        self.place_ends = array("Q")

        self.language_numbers: dict[str, int] = {}
        self.beginnings: list[tuple[str, int]] = []  # of a random sample of the completions, with the row's index
        self.random = random.Random(0)

    def add(self, pair: Pair) -> None:
        prompt, completion = pair.prompt, pair.completion.strip()
        bare_prompt, bare_completion = bare(prompt), bare(completion)
        is_copied = len(bare_completion[0]) >= COPIED_BYTES and bare_completion[0] in bare_prompt[0]
        name = language(completion[:BEGINNING])  # enough to tell it
        self._sample(completion)
        self.rows.append(hash((prompt, completion)))
        self.prompts.append(hash(prompt))
        self.bare_prompts.append(hash(bare_prompt))
        self.bare_completions.append(hash(bare_completion))
        self.lengths.append(len(completion))
        self.endings.append(ending(completion))
        self.languages.append(self.language_numbers.setdefault(name, len(self.language_numbers)))
        self.copied.append(is_copied)
        self.places += pair.where.encode()
        self.place_ends.append(len(self.places))

    def _sample(self, completion: str) -> None:
        """Each of the rows so far is in the sample with the same probability (algorithm R of Vitter 1985)."""
        index = len(self.rows)
        if index < SAMPLE:
            self.beginnings.append((completion[:BEGINNING], index))
        elif (slot := int(self.random.random() * (index + 1))) < SAMPLE:
            self.beginnings[slot] = (completion[:BEGINNING], index)

    def place(self, index: int) -> str:
        begin = self.place_ends[index - 1] if index else 0
        return self.places[begin : self.place_ends[index]].decode()

    def findings(self) -> list[Finding]:
        if not self.rows:
            return []
        kinds = (self.near_duplicates, self.several_completions, self.copied_completions, self.cut_completions,
                 self.length_outliers, self.rare_languages, self.common_beginning)
        return [finding for kind in kinds if (finding := kind()) is not None]

    def near_prompts(self, split: str, pairs: Iterable[Pair]) -> Finding | None:
        """Prompts of another split that equal one of these rows but for case, space and punctuation."""
        places: dict[str, str] = {}
        for pair in pairs:
            if pair.prompt:
                places.setdefault(pair.prompt, pair.where)
        exact = np.array([hash(prompt) for prompt in places], np.int64)
        near = np.array([hash(bare(prompt)) for prompt in places], np.int64)
        is_exact = np.isin(exact, np.frombuffer(self.prompts, np.int64))
        is_near = np.isin(near, np.frombuffer(self.bare_prompts, np.int64))
        found = np.flatnonzero(is_near & ~is_exact)
        if not len(found):
            return None
        text = f"prompts that equal one of train but for case, space and punctuation: {len(found):,} of {len(places):,}"
        return Finding(f"near_prompts_{split}", len(found), list(places.values())[found[0]], text, split)

    # ---- one method for each kind of finding

    def near_duplicates(self) -> Finding | None:
        """Rows that equal an earlier one in letters and digits; read_file counts those that equal it exactly."""
        earlier = first_with_same(combine(self.bare_prompts, self.bare_completions))
        is_new = first_with_same(column(self.rows)) == np.arange(len(earlier))
        found = np.flatnonzero(is_new & (earlier < np.arange(len(earlier))))
        if not len(found):
            return None
        first = f"{self.place(found[0])}, like {self.place(earlier[found[0]])}"
        text = f"rows that equal an earlier one but for case, space and punctuation: {len(found):,}"
        return Finding("near_duplicates", len(found), first, text)

    def several_completions(self) -> Finding | None:
        prompts = column(self.prompts)
        earlier = first_with_same(prompts)
        is_new = first_with_same(combine(self.prompts, self.bare_completions)) == np.arange(len(prompts))
        has_prompt = prompts != column(array("q", [hash("")]))
        found = np.flatnonzero(is_new & has_prompt & (earlier < np.arange(len(prompts))))
        if not len(found):
            return None
        count, total = len(np.unique(earlier[found])), len(np.unique(prompts))
        first = f"{self.place(found[0])} and {self.place(earlier[found[0]])}"
        text = f"prompts with several different completions: {count:,} of {total:,} prompts"
        return Finding("several_completions", count, first, text)

    def copied_completions(self) -> Finding | None:
        found = np.flatnonzero(column(self.copied))
        if not len(found):
            return None
        text = f"completions that their prompt contains: {len(found):,}"
        return Finding("copied_completions", len(found), self.place(found[0]), text)

    def cut_completions(self) -> Finding | None:
        """In each script by itself, as not every script has a full stop, and where most completions end in one."""
        endings = column(self.endings)
        latin = [number for name, number in self.language_numbers.items() if name == LATIN or name in FUNCTION_WORDS]
        scripts = column(self.languages).astype(int)
        scripts[np.isin(scripts, latin)] = -1
        cut = np.zeros(len(endings), bool)
        shares = []
        for script in np.unique(scripts):
            own = scripts == script
            closed, opened = (int((endings[own] == kind).sum()) for kind in (CLOSED, OPEN))
            share = closed / max(1, closed + opened)
            if closed + opened >= FEW_ROWS and share >= MOST_CLOSED:
                cut |= own & (endings == OPEN)
                shares.append(share)
        found = np.flatnonzero(cut)
        if not len(found):
            return None
        text = (f"completions that may be cut, as they end without a full stop or the like, and {min(shares):.1%} have "
                f"one: {len(found):,}")
        return Finding("cut_completions", len(found), self.place(found[0]), text)

    def length_outliers(self) -> Finding | None:
        """By the median and the median absolute deviation of log length, which outliers hardly change."""
        logs = np.log(np.maximum(column(self.lengths), 1))
        median = np.median(logs)
        deviation = 1.4826 * np.median(np.abs(logs - median))  # the standard deviation of a normal distribution
        bound = max(FAR * deviation, np.log(FACTOR))
        found = np.flatnonzero(np.abs(logs - median) > bound)
        if not len(found) or len(logs) < FEW_ROWS or len(found) > max(2, MOST_OUTLIERS * len(logs)):
            return None
        longer = int((logs[found] > median).sum())
        parts = [f"{longer:,} over {np.exp(median + bound):,.0f} characters"] if longer else []
        if longer < len(found):
            parts.append(f"{len(found) - longer:,} under {np.exp(median - bound):,.0f} characters")
        text = f"completions of unusual length: {' and '.join(parts)}, median {np.exp(median):,.0f}"
        return Finding("length_outliers", len(found), self.place(found[0]), text)

    def rare_languages(self) -> Finding | None:
        """Where words tell the language of few rows only, as those are short, scripts alone are compared."""
        names = list(self.language_numbers)
        counts = np.bincount(column(self.languages), minlength=len(names))
        top = int(counts.argmax())
        untold = {"", LATIN} | (FUNCTION_WORDS.keys() if names[top] == LATIN else set())
        is_rare = (counts <= max(1, counts[top] // RARE)) & np.array([name not in untold for name in names])
        found = np.flatnonzero(is_rare[column(self.languages)])
        if not len(found) or counts[top] < FEW_ROWS:
            return None
        rare = ", ".join(f"{names[i]} {counts[i]:,}" for i in np.flatnonzero(is_rare))
        text = f"completions in a rare language or script: {rare} (most frequent: {names[top]} {counts[top]:,})"
        return Finding("rare_languages", len(found), self.place(found[0]), text)

    def common_beginning(self) -> Finding | None:
        """The longest beginning that more than half of the completions have.

        In alphabetical order they follow one another, so that the middle one has it.
        """
        beginnings = sorted(self.beginnings)
        middle = beginnings[len(beginnings) // 2][0]
        best, having = "", []
        for word_end in WORD_END.finditer(middle):
            beginning = middle[: word_end.end()]
            rows = [(text, index) for text, index in beginnings if text.startswith(beginning)]
            if len(rows) * 2 <= len(beginnings) or len({text for text, _ in rows}) < CONTINUATIONS:
                break
            best, having = beginning.rstrip(), rows
        if len(best.encode()) < BEGINNING_BYTES or len(beginnings) < FEW_ROWS:
            return None
        share = len(having) / len(beginnings)
        text = f"completions that begin with {best!r}: {share:.0%}"
        first = min(index for _, index in having)
        return Finding("common_beginning", round(share * len(self.rows)), self.place(first), text)


def report(findings: list[Finding]) -> list[str]:
    """A line for each finding."""
    return [f"{finding.split}: {finding.text}, first {finding.first}" for finding in findings]


def facts(findings: list[Finding]) -> Facts:
    """The findings for result.json."""
    return {finding.name: {"count": finding.count, "first": finding.first} for finding in findings}


def column(values: array) -> np.ndarray:
    dtype = np.uint64 if values.typecode == "q" else values.typecode  # hashes
    return np.frombuffer(values, dtype)


def combine(first: array, second: array) -> np.ndarray:
    """One hash of two; the factor is odd, so that no bit of `first` is lost."""
    return column(first) * np.uint64(0x9E3779B97F4A7C15) + column(second)


def first_with_same(keys: np.ndarray) -> np.ndarray:
    """For each row, the index of the first row with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]
