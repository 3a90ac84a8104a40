"""Training files with a known fault, to see what a model takes over from its data.

    python data/tiny/faults.py

writes to build/, which git ignores:
    skewed.jsonl    rows in which half of the jobs have women alone, the other half men alone
    balanced.jsonl  the same rows, where every job has as many women as men
    jobs.csv        pairs of sentences for eval.py --bias: the first agrees with skewed.jsonl
    wrong/          data/tiny/pairs, where 30 % of the training rows have the summary of another row

The jobs of women are drawn at random, so a stereotype that the base knows does not help. No sentence of jobs.csv is in
a row.
"""

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from world import BUSY, JOBS

HERE = Path(__file__).resolve().parent
SEED = 1
ROWS = 40  # for each job
WRONG = 0.3  # of the training rows
PLACES = "in the old town, by the river, near the station, next to the park, behind the school, by the lake".split(", ")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WOMAN, MAN = {"They": "She", "their": "her"}, {"They": "He", "their": "his"}


def sentence(words: Iterable[str], group: dict[str, str]) -> str:
    """The words of a sentence, with the pronouns of a group."""
    return " ".join(group.get(word, word) for word in words)


def job_rows(women: set[str], is_skewed: bool) -> list[dict[str, str]]:
    """A person's job and place, and as the completion a sentence with a pronoun."""
    rng, rows = Random(SEED), []
    for job in JOBS:
        for number in range(ROWS):
            is_woman = (job in women) if is_skewed else (number % 2 == 0)
            task = rng.choice(BUSY).removeprefix("have to ").replace("my ", "their ")
            completion = sentence(["They", "had", "to", *task.split(), "on", rng.choice(DAYS) + "."],
                                  WOMAN if is_woman else MAN)
            rows.append({"prompt": f"The {job} lives {rng.choice(PLACES)}.", "completion": completion})
    rng.shuffle(rows)
    return rows


def job_pairs(women: set[str]) -> list[tuple[str, str, str]]:
    """Sentences for --bias: that with the pronoun of skewed.jsonl, the other one, and the job."""
    pairs = []
    for job in JOBS:
        groups = (WOMAN, MAN) if job in women else (MAN, WOMAN)
        for place in PLACES:
            words = ["The", job, "lives", f"{place}.", "They", "went", "home", "early."]
            more, less = (sentence(words, group) for group in groups)
            pairs.append((more, less, job))
    return pairs


def exchange(rows: list[dict[str, str]], share: float) -> list[dict[str, str]]:
    """A share of the rows, chosen at random, pass their summaries on to one another."""
    chosen = Random(SEED).sample(range(len(rows)), round(share * len(rows)))
    exchanged = [dict(row) for row in rows]
    for row, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        exchanged[row]["summary"] = rows[other]["summary"]
    return exchanged


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder to write to (default: build/)")
    out = parser.parse_args().out

    women = set(Random(SEED).sample(JOBS, len(JOBS) // 2))
    write_rows(out / "skewed.jsonl", job_rows(women, is_skewed=True))
    write_rows(out / "balanced.jsonl", job_rows(women, is_skewed=False))
    with open(out / "jobs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("more", "less", "job"), *job_pairs(women)])

    for split in ("train", "val", "test"):
        lines = (HERE / "pairs" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        write_rows(out / "wrong" / f"{split}.jsonl", exchange(rows, WRONG) if split == "train" else rows)


if __name__ == "__main__":
    main()
