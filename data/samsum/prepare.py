"""SAMSum: messenger dialogues with summaries, written by linguists. Fields: dialogue, summary.

For      abstractive summarization (Gliwa et al. 2019, arXiv 1911.12237); the SAMSum column of the LoRA paper
Rows     train 14,732, val 818, test 819; the mirror's train has been seen with 14,731
Licence  CC BY-NC-ND 4.0: research, no commercial use, no derivatives
From     huggingface.co/datasets/knkarthick/samsum, a mirror as .csv (the authors' repository on the Hub is
         gone); the original is arxiv.org/src/1911.12237v2/anc/corpus.7z, which Python cannot unpack: unpack
         it by hand and pass its folder with --source

The texts are kept as they are, carriage returns included, and so is the original's train row 13828807, whose
dialogue is empty (the loader drops it and says so). The addresses were written down without being tried.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this runs as a script, from anywhere

from data.prepare import PublicFile, Row, parse_arguments, read_files, text, write_splits  # noqa: E402
from minift.errors import run_script  # noqa: E402

URL = "https://huggingface.co/datasets/knkarthick/samsum/resolve/main/"
FILES = (
    PublicFile("train", URL + "train.csv", ("train",), (14_732, 14_731)),
    PublicFile("val", URL + "validation.csv", ("val", "validation"), (818,)),
    PublicFile("test", URL + "test.csv", ("test",), (819,)),
)


def convert(fields: dict[str, Any]) -> list[Row]:
    return [{"dialogue": text(fields, "dialogue"), "summary": text(fields, "summary")}]


def main(arguments: list[str]) -> None:
    options = parse_arguments(__doc__, arguments, Path(__file__).parent)
    write_splits(read_files(FILES, options.source, convert), options.out)


if __name__ == "__main__":
    run_script(main)
