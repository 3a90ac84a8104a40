"""DialogSum: spoken dialogues of daily life with summaries. Fields: dialogue, summary.

For      abstractive summarization (Chen et al. 2021, aclanthology.org/2021.findings-acl.449)
Rows     train 12,460, val 500, test 1,500: its 500 dialogues have three reference summaries each, written
         here as three rows with the same dialogue
Licence  CC BY-NC-SA 4.0, as the Hub's card of knkarthick/dialogsum says: no commercial use, share alike
From     github.com/cylnlp/dialogsum, the authors' own repository

The addresses were written down without being tried.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this runs as a script, from anywhere

from data.prepare import PublicFile, Row, parse_arguments, read_files, text, write_splits  # noqa: E402
from minift.errors import run_script  # noqa: E402

URL = "https://raw.githubusercontent.com/cylnlp/dialogsum/main/DialogSum_Data/"
FILES = (
    PublicFile("train", URL + "dialogsum.train.jsonl", ("dialogsum.train", "train"), (12_460,)),
    PublicFile("val", URL + "dialogsum.dev.jsonl", ("dialogsum.dev", "val", "validation"), (500,)),
    PublicFile("test", URL + "dialogsum.test.jsonl", ("dialogsum.test", "test"), (1_500,)),
)


def convert(fields: dict[str, Any]) -> list[Row]:
    names = ["summary1", "summary2", "summary3"] if "summary1" in fields else ["summary"]
    return [{"dialogue": text(fields, "dialogue"), "summary": text(fields, name)} for name in names]


def main(arguments: list[str]) -> None:
    options = parse_arguments(__doc__, arguments, Path(__file__).parent)
    write_splits(read_files(FILES, options.source, convert), options.out)


if __name__ == "__main__":
    run_script(main)
